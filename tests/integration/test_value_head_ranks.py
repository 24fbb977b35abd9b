"""Two ranks, one with more rollouts than the other, train a value head as one rank does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import json, sys
from tests.harness import Local, settings

rank, port, *overrides = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
config = settings(
    "bandit_ppo_value", "learner.minibatch=90", "replay.samples_per_round=90", "learner.updates=4",
    "learner.micro_batch=10", "replay.inner_epochs=2", "objective.kl_horizon=90", *overrides,
)
local = Local(config, rank=rank, port=port)
steps = [(record.loss, record.kl_coefficient) for record in local.steps(4)]
print("STEPS", json.dumps([*steps, [0.0, local.learner.kl.coefficient]]))
"""


def run(*overrides: str, ranks: int) -> list[np.ndarray]:
    """Loss and β by step, [5, 2], of each rank; the last row has β after the last step."""
    from tests.harness import free_port

    port, environment = str(free_port()), dict(os.environ, PYTHONPATH=str(ROOT))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, f"learner.ranks={ranks}", *overrides],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    out = []
    try:
        for process in processes:
            text, _ = process.communicate(timeout=240)
            assert process.returncode == 0, text[-2000:]
            out.append(np.array(json.loads(text.partition("STEPS ")[2].splitlines()[0])))
    finally:
        for process in processes:
            process.kill()
    return out


@pytest.mark.timeout(500)
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_ranks_whiten_and_steer_as_one(zero_stage: int) -> None:
    (one,) = run(ranks=1)
    first, second = run(f"learner.zero_stage={zero_stage}", ranks=2)
    np.testing.assert_allclose(first[:, 0] + second[:, 0], one[:, 0], atol=2e-5)
    assert np.abs(one[:, 0]).max() > 1e-4
    assert np.array_equal(first[:, 1], second[:, 1])  # β is the same on all ranks
    np.testing.assert_allclose(first[:, 1], one[:, 1], rtol=1e-6)
    assert one[-1, 1] != one[0, 1]
