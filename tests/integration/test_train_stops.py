"""Runs that end before their last update, or never begin, and say why."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.checkpoints import Checkpoints
from cluster.train import train
from configs.load import prepare
from tests.harness import balanced, settings


def test_a_reward_that_breaks_is_stated_and_stops_the_run(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken_reward.py").write_text(
        "def reward(prompts, responses):\n    return [1.0] * (len(responses) + 1)\n"
    )
    config = prepare(
        "bandit",
        [f"run.dir={tmp_path}", "reward.kind=function", "reward.path=broken_reward:reward",
         "rollout.responses_per_prompt=2", "limits.failure_window=40", "eval.samples=2"],
    )  # fmt: skip
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    summary = train(config, "bandit")
    assert summary["status"] == "failed"
    assert "limits.failure_rate" in summary["failure"] and "rewards for" in summary["failure"]
    assert summary["ledger"]["retired"]["reward_failed"] >= 40 and balanced(summary["ledger"])


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run_with_its_checkpoint(
    ray_cluster, tmp_path
):
    """exp(r/β) overflows at a reward of 1, which comes after some rounds of 0.01."""
    config = prepare("bandit_rwr", [
        f"run.dir={tmp_path}", "run.name=nan", "eval.every=0", "replay.inner_epochs=1",
        "objective.beta=1e-3", "reward.kind=function", "learner.updates=30", "checkpoint.every=2",
        "reward.path=tests.integration.late_overflow:score", "checkpoint.seconds=0",
    ])  # fmt: skip
    summary = train(config, "bandit_rwr")
    good = summary["updates"]
    assert summary["status"] == "failed" and summary["skipped"] == 3
    assert good in (11, 12)  # the first evaluation's responses are scored, too
    assert f"batches {good} … {good + 2}: " in summary["failure"]
    assert "limits.skipped_steps=3" in summary["failure"]
    checkpoint = Checkpoints(tmp_path / "nan" / "checkpoints", 2).newest(pytest.fail)
    assert checkpoint is not None and checkpoint.name >= "batch-00000002"


def test_ctrl_c_stops_writes_the_summary_and_leaves_no_process(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "cluster", "train", "bandit", f"run.dir={tmp_path}",
               "run.name=stopped", "learner.updates=100000"]  # fmt: skip
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    metrics, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["updates"] > 0
    assert balanced(summary["ledger"])
    deadline = time.monotonic() + 20
    while left := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def descendants(pid: int) -> set[int]:
    """Process ids below one, by /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = set(), [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo.extend(below)
    return found


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["prompts.source=jsonl", "prompts.path=none.jsonl"], ["none.jsonl"]),
        (["learner.minibatch=95"], ["learner.minibatch", "95", "set"]),
        (["learner.lrr=1"], ["learner.lrr", "learner.lr"]),
        (["reward.kind=function", "reward.path=no_such_module:f"], ["no_such_module"]),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(capsys, tmp_path, overrides, words):
    status = main(["train", "bandit", f"run.dir={tmp_path}/runs", *overrides])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "runs").exists()


def test_a_finished_name_is_refused_and_an_unfinished_one_is_taken_again(tmp_path):
    from cluster.run_directory import claim

    config = settings("bandit", f"run.dir={tmp_path}", "run.name=mine")
    directory = claim(config, "bandit")
    directory.metrics.write_text("{half a li")
    with pytest.raises(ValueError, match="mine.*still running"):
        claim(config, "bandit")
    del directory
    directory = claim(config, "bandit")
    assert not directory.metrics.exists()
    directory.write_summary({"status": "finished"})
    with pytest.raises(ValueError, match="mine.*is finished"):
        claim(config, "bandit")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("42")
    with pytest.raises(ValueError, match="no run made"):
        claim(settings("bandit", f"run.dir={tmp_path}", "run.name=precious"), "bandit")
    assert [claim(settings("bandit", f"run.dir={tmp_path}"), "bandit").name for _ in range(2)] == [
        "bandit-1", "bandit-2",
    ]  # fmt: skip
