"""What `bench overlap` adds to a stage is what it says, and is in the stage's own clock."""

import time

import pytest
import torch

from actors import policy
from actors.engine import Request
from actors.rollout import GroupId, Version
from benchmarks import overlap
from benchmarks.overlap_work import SlowedWorker, spend
from cluster.__main__ import main
from tests.harness import settings


def test_work_takes_cpu_time_and_sleep_takes_none():
    network = torch.nn.Linear(10, 10)
    taken = {}
    for kind in ("work", "sleep"):
        wall, cpu = time.monotonic(), time.thread_time()
        spend(kind, 0.05, lambda tokens, use_cache: network(tokens.float()))
        taken[kind] = time.monotonic() - wall, time.thread_time() - cpu
    assert taken["work"][1] >= 0.05 and taken["sleep"][0] >= 0.05
    assert taken["sleep"][1] < 0.02


def test_a_slowed_actor_takes_its_extra_time_for_each_lease():
    config = settings("bandit", "rollout.responses_per_prompt=2")
    worker = SlowedWorker(config, 0, "", "", "sleep", 0.2)
    assert worker.engine is not None
    network = policy.build(policy.architecture(config))
    worker.engine.load(policy.flatten(network), Version(0, 0))
    started = time.monotonic()
    block = worker.engine.generate([Request(GroupId(0, 0), worker.prompts[0])], "rollout")
    assert time.monotonic() - started >= 0.2 and len(block.reward_N) == 2


def test_the_clocks_of_a_run_are_held_against_its_wall_time():
    """10 updates in 10 s: the actor waits 4 s and works 5, so 1 s is nobody's; the learner's clock
    has 9.5 s."""
    summary = {
        "train_seconds": 10.0, "seconds_per_update": {"wait": 0.5, "step": 0.4, "publish": 0.05},
        "actor_seconds": {0: {"lease": 4.0, "generate": 4.5, "score": 0.3, "put": 0.2}},
        "idle": {"actors": 0.42, "learner": 0.52}, "age": {"histogram": {"1": 9, "0": 1}},
    }  # fmt: skip
    row = overlap.times(summary, 10)
    assert (row["wall"], row["t_gen"], row["t_learn"]) == pytest.approx((1.0, 0.5, 0.45))
    assert row["actor_unaccounted"] == pytest.approx(0.1)
    assert row["learner_unaccounted"] == pytest.approx(0.05)
    assert row["idle_clocks_apart"] == pytest.approx(abs(0.42 - 4 / 9))
    assert row["ages"] == [0, 1]


@pytest.mark.parametrize("text", ["turns=0", "updates=x", "turns="])
@pytest.mark.parametrize("bench", ["bandit", "overlap"])
def test_a_setting_of_the_bench_that_cannot_be_used_is_one_line(bench, text, capsys):
    assert main(["bench", bench, text]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {text}: ")
