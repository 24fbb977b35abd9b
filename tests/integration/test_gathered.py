"""Weights leave a ZeRO-3 learner of several ranks one parameter at a time, in one order."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import sys
import numpy as np
import torch
from actors import policy
from configs.schema import BanditPolicyConfig, LearnerConfig
from learner.engine import DeepSpeedEngine, join

rank, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
join(rank, 2, ("127.0.0.1", port), 1)
torch.manual_seed(0)
# Wide enough: DeepSpeed leaves parameters of less than 100,000 numbers whole on every rank.
shape = BanditPolicyConfig(vocabulary=1000, layers=2, width=192)
model = policy.build(policy.bandit_architecture(shape, 10))
before, shapes = policy.flatten(model), [tuple(p.shape) for p in policy.parameters(model)]
engine = DeepSpeedEngine(model, LearnerConfig(zero_stage=3, micro_batch=1), 2)
assert [shape for _, _, shape in engine.layout()] == shapes
whole = []  # parameters that are there as a whole, while one is gathered
names = []
for name, tensor in engine.gathered():
    names.append(name)
    held = [p for p in policy.parameters(engine.engine.module) if p.numel()]
    whole.append(sum(p.ds_persist is False for p in held))
assert names == [name for name, _, _ in engine.layout()]
assert max(whole) == 1, whole
passed = []
flat = engine.weights(lambda name, tensor: passed.append((name, tensor.clone())))
assert [name for name, _ in passed] == names
assert np.array_equal(flat, before)
assert np.array_equal(np.concatenate([t.reshape(-1).numpy() for _, t in passed]), before)
np.save(out, flat)
"""


@pytest.mark.timeout(300)
def test_two_zero_3_ranks_gather_one_parameter_at_a_time_and_the_same_whole(tmp_path):
    from tests.harness import free_port

    port, environment = str(free_port()), dict(os.environ, PYTHONPATH=str(ROOT))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, str(tmp_path / f"{rank}.npy")],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=240)
            assert rank.returncode == 0, output[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    assert np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
