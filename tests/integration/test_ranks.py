"""Ranks and ZeRO stages change no loss on varying lengths, with micro-batches by tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.harness import free_port
from tests.varying import settings_for

ROOT = Path(__file__).parents[2]
GROUPS = 5  # two ranks have three and two of them: unequal micro-batches, filled up
RANK = """
import json, sys
import numpy as np
from learner import learner as module
from learner.engine import join
from tests.harness import settings
from tests.varying import batch_of, rollouts

rank, ranks, port, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
join(rank, ranks, ("127.0.0.1", port), 1)
found = {}
for name, overrides in json.load(open(sys.argv[5])).items():
    learner = module.Learner(settings(*overrides, f"learner.ranks={ranks}"), rank)
    fill_up, filled = learner._fill_up, []
    learner._fill_up = lambda last: (filled.append(last), fill_up(last))
    losses = []
    for number in range(2):
        record, _ = learner.consume(batch_of(rollouts(GROUPS), rank, ranks, number))
        assert record.stepped
        losses.append(record.loss)
    found[name] = [losses, learner.weights().tolist(), len(filled)]
json.dump(found, open(out, "w"))
""".replace("GROUPS", str(GROUPS))


def consumed(folder: Path, ranks: int, runs: dict[str, list[str]]) -> list[dict]:
    """By rank and run: losses, weights afterwards, and how often it filled up."""
    port, environment = str(free_port()), dict(os.environ, PYTHONPATH=str(ROOT))
    (folder / "runs.json").write_text(json.dumps(runs))
    outs = [folder / f"{rank}-of-{ranks}.json" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(ranks), port, str(out),
             str(folder / "runs.json")],
            cwd=ROOT, env=environment, stdout=out.with_suffix(".txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for process, out in zip(processes, outs):
            assert process.wait(timeout=400) == 0, out.with_suffix(".txt").read_text()[-2000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape, stages", [("gpt2", (0, 1, 2, 3)), ("gpt_neox", ())])
def test_two_ranks_give_the_losses_and_steps_of_one_under_zero(tmp_path, shape, stages):
    common = [
        "bandit_dpo", *settings_for(tmp_path, shape, wide=True), "rollout.responses_per_prompt=4",
        f"learner.minibatch={4 * GROUPS}", f"replay.samples_per_round={4 * GROUPS}",
        "replay.inner_epochs=1", "learner.lr=3e-4",
    ]  # fmt: skip
    by_tokens = [*common, "learner.micro_tokens=160"]
    packed = [*by_tokens, "learner.packing=true", "learner.gradient_checkpointing=true"]
    adapter = ["learner.lora.rank=4", "learner.lr=3e-3"]
    runs = {f"{stage}": [*by_tokens, f"learner.zero_stage={stage}"] for stage in stages}
    runs["3 packed"] = [*packed, "learner.zero_stage=3"]
    for stage in (0, 2, 3) if stages else (3,):
        runs[f"{stage} lora"] = [*packed, f"learner.zero_stage={stage}", *adapter]
    alone = consumed(tmp_path, 1, {"whole": common, "lora": [*common, *adapter]})[0]
    two = consumed(tmp_path, 2, runs)
    for name in runs:
        one = alone["lora" if "lora" in name else "whole"]
        assert one[0][-1] < one[0][0]
        losses = np.sum([rank[name][0] for rank in two], 0)
        assert np.allclose(losses, one[0], rtol=1e-5, atol=1e-5), name
        apart = np.abs(np.array(two[0][name][1]) - one[1])
        # Adam turns the rounding of a gradient near 0 into a step of any size up to lr: the mean.
        assert apart.mean() < 1e-6, name
    assert max(rank[name][2] for rank in two for name in runs) > 0
