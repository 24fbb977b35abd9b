"""Several raylets on one machine: parts land where the settings say, and a node may be lost."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
NODES = {
    "head": {"num_cpus": 2, "labels": {"role": "head"}},
    "learner": {"num_cpus": 2, "labels": {"role": "learner"}},
    "one": {"num_cpus": 1, "labels": {"role": "rollout"}},
    "two": {"num_cpus": 1, "labels": {"role": "rollout"}},
}
PLACED = [
    "cluster.learner_cpus=1", "cluster.nodes.learner=role=learner",
    "cluster.actor_cpus=1", "cluster.nodes.actors=role=rollout",
    "cluster.evaluator_cpus=0.5", "cluster.nodes.evaluator=role=learner",
    "cluster.reward_cpus=0.5", "cluster.nodes.reward=role=learner",
]  # fmt: skip
WHERE = {
    "LearnerWorker": ["learner"], "Evaluator": ["learner"], "Scorer": ["learner"],
    "RolloutWorker": ["one", "two"],
}  # fmt: skip
UPDATES = 250  # so many take longer than Ray does to miss a node, on any machine
QUEUE = "QueueService"  # where the driver is: of raylets on one machine it takes any


class Nodes:
    """The cluster's process, and its nodes' raylets as seen from outside."""

    def __init__(self) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = dict(os.environ, PYTHONPATH=str(ROOT), **token)
        self.environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, str(Path(__file__).with_name("raylets.py")), json.dumps(NODES)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.address, self.raylets = told["address"], told["raylets"]

    def train(self, folder: Path, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster", "train", "bandit", f"run.dir={folder}",
                   f"cluster.address={self.address}", "run.name=placed", *PLACED]  # fmt: skip
        return subprocess.Popen(
            [*command, *overrides], cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def where(self) -> dict[str, list[str]]:
        """The nodes that processes of each of WHERE's kinds are on."""
        found: dict[str, list[str]] = {kind: [] for kind in (*WHERE, QUEUE)}
        for name, pid in self.raylets.items():
            for process in psutil.Process(pid).children():
                title = " ".join(process.cmdline())
                for kind in found:
                    if title.startswith("ray::") and kind in title:
                        found[kind].append(name)
        return {kind: sorted(names) for kind, names in found.items()}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    try:
        yield started
    finally:
        assert started.process.stdin is not None
        started.process.stdin.close()
        started.process.wait(60)


def ended(run: subprocess.Popen[str]) -> str:
    try:
        return run.communicate(timeout=400)[0]
    finally:
        run.kill()


def wait_for_updates(run: subprocess.Popen[str], metrics: Path, count: int) -> None:
    until = time.monotonic() + 400  # a start, on a busy machine
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert run.poll() is None and time.monotonic() < until, ended(run)
        time.sleep(0.1)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "placed" / "summary.json").read_text())


def test_what_the_cluster_has_no_room_for_is_said_and_ends_the_run(nodes, tmp_path):
    run = nodes.train(tmp_path, "rollout.actors=3", "limits.placement_seconds=2")
    output = " ".join(ended(run).split())
    assert run.returncode == 1, output
    failure = summary(tmp_path)["failure"]
    assert "no room for rollout actor 2 (CPU 1, role=rollout)" in failure
    assert "is not role=rollout" in failure and "has CPU 0 of 1 free" in failure
    assert "limits.placement_seconds=2" in failure and "\n" not in failure


@pytest.mark.timeout(900)
def test_parts_land_where_settings_say_and_a_lost_node_costs_one_actor_and_nothing_else(
    nodes, tmp_path
):
    run = nodes.train(tmp_path, "rollout.actors=2", f"learner.updates={UPDATES}", "rollout.lease=2")
    wait_for_updates(run, tmp_path / "placed" / "metrics.jsonl", 20)
    where = nodes.where()
    (drivers,) = where.pop(QUEUE)
    assert where == WHERE
    lost = "one" if drivers == "two" else "two"
    os.kill(nodes.raylets.pop(lost), signal.SIGKILL)
    output = " ".join(ended(run).split())
    assert run.returncode == 0, output
    assert "the run goes on without rollout actor" in output
    assert "(CPU 1, role=rollout)" in output
    out = summary(tmp_path)
    assert out["status"] == "finished" and out["updates"] == UPDATES
    ledger = out["ledger"]
    assert ledger["issued"] == ledger["retired"]["exhausted"] == 10 * UPDATES
    restarts = out["recovery"]["restarts"]
    assert restarts["learner"] == restarts["evaluator"] == 0, output
    assert restarts["actors"] in (1, 2), output  # again, where Ray knows the node is gone only then
