"""Every part is broken at every hand-over, in every way, and the run ends with its books balanced.

One run for each kind of fault, with a fault at each point, one after another. The README's table
says what is promised.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.train import train
from configs import faults
from configs.load import prepare

MAX_AGE, REUSE = 7, 2
UPDATES = {"hang": 500}  # each part that hangs in writing holds up checkpoints for a while
NTH = {"actor": 3, "learner": 5, "queue": 7, "driver": 1}
# A driver that dies is gone on from by the next command: tests/chaos/test_cluster_dies.py.
CASES = [
    (kind, point) for kind in faults.KINDS for point in faults.POINTS
    if not (kind == "kill" and point.startswith("driver"))
]  # fmt: skip
LONG = {"hang": pytest.mark.long}  # recorded in docs/reliability.md


@dataclass
class Story:
    """A run that is over."""

    summary: dict[str, Any]
    steps: list[int]
    happened: set[str]


def updates(kind: str) -> int:
    return UPDATES.get(kind, 150)


def fault(kind: str, point: str) -> str:
    part, what = point.split(".")[:2]
    nth = 1 if what == "write" else NTH[part]
    return f"{point}@{nth}:{kind}"


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> dict[str, Story]:
    """Runs by kind of fault, each made once."""
    return {}


@pytest.fixture
def story(ray_cluster, stories, kind, tmp_path_factory) -> Story:
    if kind not in stories:
        stories[kind] = tell(kind, tmp_path_factory.mktemp(kind))
    return stories[kind]


def tell(kind: str, folder: Path) -> Story:
    """A pipelined run with two actors, in which every fault of a kind happens."""
    what = ",".join(fault(kind, point) for k, point in CASES if k == kind)
    config = prepare(
        "bandit_pipelined",
        [
            f"run.dir={folder}", "run.name=faults", f"cluster.faults={what}",
            f"learner.updates={updates(kind)}", f"replay.inner_epochs={REUSE}",
            f"replay.max_age={MAX_AGE}", "rollout.lease=5", "eval.every=50", "eval.samples=20",
            "checkpoint.every=10", "checkpoint.seconds=0", "limits.backoff_seconds=0.05",
            "limits.actor_restarts=60", "limits.learner_restarts=60", "limits.queue_restarts=60",
            "limits.prompt_attempts=20", "limits.lease_seconds=6", "limits.step_seconds=7",
            "limits.queue_seconds=15", "limits.stall_seconds=120",
        ],
    )  # fmt: skip
    summary = train(config, "bandit_pipelined")
    run = folder / "faults"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    happened = {path.name for path in (run / "faults").iterdir()}
    return Story(summary, [json.loads(line)["step"] for line in lines], happened)


@pytest.mark.parametrize(
    "kind, point", [pytest.param(*case, marks=LONG.get(case[0], ())) for case in CASES]
)
@pytest.mark.timeout(900)
def test_a_fault_at_any_point_costs_time_and_nothing_else(story, kind, point):
    assert fault(kind, point) in story.happened
    summary = story.summary
    assert summary["status"] == "finished", summary["failure"]
    assert story.steps == list(range(1, updates(kind) + 1))
    ledger = summary["ledger"]
    accounted = ledger["in_flight"] + ledger["queued"] + sum(ledger["retired"].values())
    assert ledger["issued"] == accounted
    assert ledger["retired"]["expired"] == ledger["retired"]["lost"] == 0
    assert summary["age"]["max"] <= MAX_AGE and summary["reuse"]["max"] == REUSE
    assert sum(summary["reuse"]["histogram"].values()) == 100 * updates(kind)


def test_what_died_was_started_again_and_only_that(ray_cluster, stories):
    assert ray.is_initialized()
    if "slow" in stories:
        assert stories["slow"].summary["recovery"]["restarts"]["learner"] == 0
    if "kill" in stories:
        restarts = stories["kill"].summary["recovery"]["restarts"]
        assert restarts["actors"] >= 8 and restarts["learner"] >= 8
