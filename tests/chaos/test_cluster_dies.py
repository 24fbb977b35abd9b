"""kill -9 of everything at a random moment; the same command again goes on as if nothing were."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
UPDATES = 120
LONGER, KILLS = 400, 20
SETTINGS = [
    "eval.every=40", "eval.samples=50", "checkpoint.every=8",
    "checkpoint.seconds=0",
]  # fmt: skip


def command(folder: Path, name: str, updates: int = UPDATES) -> list[str]:
    own = [f"run.dir={folder}", f"run.name={name}", f"learner.updates={updates}"]
    return [sys.executable, "-m", "cluster", "train", "bandit_ppo", *own, *SETTINGS]


def start(folder: Path, name: str, updates: int = UPDATES) -> "subprocess.Popen[bytes]":
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    out = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(
        command(folder, name, updates), cwd=ROOT, stdout=out, stderr=out, env=environment
    )


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_everything(process: "subprocess.Popen[bytes]") -> None:
    """The driver, the whole Ray cluster and every process of ours below it, at once."""
    family = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *family]:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(30)


def wait_for(process: "subprocess.Popen[bytes]", folder: Path, name: str, steps: int) -> None:
    """Until so many lines of metrics are there."""
    deadline = time.monotonic() + 240
    while len(lines(folder, name)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_a_checkpoint(process: "subprocess.Popen[bytes]", run: Path) -> None:
    """Until one is whole: it waits for its evaluation, which busy cores may keep back."""
    while not list((run / "checkpoints").glob("batch-????????")):
        assert process.poll() is None
        time.sleep(0.01)


def assert_same(again: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    """Every step once, and as in the run that nothing happened to."""
    assert [line["step"] for line in again] == list(range(1, len(whole) + 1))
    for name in ("loss", "age", "reuse", "reward_mean", "reward_eval", "kl_to_generator"):
        assert [line.get(name) for line in again] == [line.get(name) for line in whole], name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, Any]]:
    """The metrics of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, "whole").wait(200) == 0, (folder / "whole.log").read_text()
    return lines(folder, "whole")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_with_its_cluster_goes_on_bit_for_bit(tmp_path, undisturbed, seed):
    after = random.Random(seed).randint(10, UPDATES - 30)
    process = start(tmp_path, "killed")
    wait_for(process, tmp_path, "killed", after)
    wait_for_a_checkpoint(process, tmp_path / "killed")
    kill_everything(process)
    assert start(tmp_path, "killed").wait(200) == 0, (tmp_path / "killed.log").read_text()
    assert_same(lines(tmp_path, "killed"), undisturbed)
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    ledger = summary["ledger"]
    assert summary["recovery"]["resumed_at"] > 0 and summary["recovery"]["lineage"] == 1
    assert ledger["issued"] == sum(ledger["retired"].values())
    assert ledger["retired"]["exhausted"] == 10 * UPDATES
    assert set(summary["reuse"]["histogram"]) == {str(n) for n in range(1, 11)}
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").glob("batch-*")}
    assert len(left) <= 2  # the disk is bounded


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_run_killed_twenty_times_over_goes_on_bit_for_bit(tmp_path):
    assert start(tmp_path, "whole", LONGER).wait(400) == 0
    draw, folder = random.Random(0), tmp_path / "killed"
    for number in range(KILLS):
        done = len(lines(tmp_path, "killed"))
        process = start(tmp_path, "killed", LONGER)
        if number % 5:  # else at any time of its start
            wait_for(process, tmp_path, "killed", done + draw.randint(1, 25))
        time.sleep(draw.uniform(0.0, 1.0 if number % 5 else 15.0))
        kill_everything(process)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        kept = len(list((folder / "checkpoints").glob("batch-*")))
        print(f"kill {number + 1}: step {len(lines(tmp_path, 'killed'))}, {size / 1e6:.1f} MB")
        assert size < 50e6 and kept <= 4  # the newest two, one being pruned, one being written
    assert start(tmp_path, "killed", LONGER).wait(400) == 0, (tmp_path / "killed.log").read_text()
    assert_same(lines(tmp_path, "killed"), lines(tmp_path, "whole"))
    ledger = json.loads((folder / "summary.json").read_text())["ledger"]
    assert ledger["issued"] == sum(ledger["retired"].values())
    assert ledger["retired"]["exhausted"] == 10 * LONGER


@pytest.mark.timeout(600)
def test_sigterm_checkpoints_and_another_setting_is_refused_with_a_diff(tmp_path, undisturbed):
    process = start(tmp_path, "stopped")
    wait_for(process, tmp_path, "stopped", 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    stopped = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert stopped["status"] == "stopped" and stopped["recovery"]["signal"] == "SIGTERM"
    done = len(lines(tmp_path, "stopped"))
    newest = max((tmp_path / "stopped" / "checkpoints").glob("batch-*"))
    assert newest.name == f"batch-{done:08d}"  # of the very last step
    changed = subprocess.run(
        [*command(tmp_path, "stopped"), "learner.lr=0.01"], cwd=ROOT, capture_output=True, text=True
    )
    assert changed.returncode == 2 and "learner.lr: 0.001 → 0.01" in changed.stderr
    assert start(tmp_path, "stopped").wait(200) == 0
    again = lines(tmp_path, "stopped")
    assert [line["loss"] for line in again] == [line["loss"] for line in undisturbed]
