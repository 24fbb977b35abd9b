"""A Ray cluster with its dashboard and token, and the bandit as a job on it."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.harness import free_port

ROOT = Path(__file__).parents[2]
SENT = ("configs", "actors", "reward_server", "learner", "cluster", "pyproject.toml",
        "constraints.txt")  # fmt: skip
OURS = ("LearnerWorker", "RolloutWorker", "Evaluator", "QueueService", "ServeReplica",
        "ServeController", "-m cluster train")  # fmt: skip
STOPPED_WITHIN = 60.0  # seconds; the runtime environment gives 300


class Head:
    """`ray start --head`, and the command line of its user."""

    def __init__(self, folder: Path, temporary: str) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self.folder = folder
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | token
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ports = [f"--{which}={free_port()}" for which in (
            "port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
            "ray-client-server-port",
        )]  # fmt: skip
        command = ["ray", "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats",
                   "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}", *ports,
                   f"--dashboard-port={self.address.rsplit(':', 1)[1]}"]  # fmt: skip
        with (folder / "ray").open("w") as out:
            self.process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def get(self, token: str | None = None) -> int:
        """The status of the list of jobs."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = f"{self.address}/api/jobs/"
        return httpx.get(url, headers=headers, timeout=10.0, trust_env=False).status_code

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A command in the clean directory."""
        return subprocess.Popen(
            command, cwd=self.folder / "checkout", env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __call__(self, *command: str, **environment: str) -> tuple[int, str]:
        process = self.start(*command, **environment)
        output = process.communicate(timeout=240)[0]
        return process.returncode, output

    def ours(self) -> list[str]:
        """Titles of a run's processes that are there."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        titles = [" ".join(p.cmdline()) for p in below if p.is_running()]
        return [title for title in titles if any(part in title for part in OURS)]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("jobs")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SENT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, checkout)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        started = Head(folder, short)
        try:
            said = folder / "ray"
            wait_for(lambda: "Ray runtime started" in said.read_text(), 90, said.read_text)
            wait_for(lambda: answers(started), 60, said.read_text)
            yield started
        finally:
            started.process.terminate()
            started.process.wait(60)


def answers(head: Head) -> bool:
    try:
        return head.get(head.environment["RAY_AUTH_TOKEN"]) == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: Any, seconds: float, why: Any) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, why()
        time.sleep(0.1)


def summary(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "summary.json").read_text())


def test_without_the_token_and_with_a_wrong_one_the_job_api_refuses_in_under_a_second(head):
    for token in (None, "wrong"):
        began = time.monotonic()
        assert head.get(token) in (401, 403)
        assert time.monotonic() - began < 1.0


def test_a_wrong_token_and_wrong_settings_are_one_line_each(head, tmp_path):
    wrong = "0" * 64
    submit = ["python", "-m", "cluster", "submit", "bandit", "--address", head.address]
    status, said = head(*submit, RAY_AUTH_TOKEN=wrong)
    assert status == 2 and said.count("\n") == 1 and "token" in said and wrong not in said, said
    status, said = head(*submit, "learner.minibatch=33")
    assert status == 2 and said.count("\n") == 1 and "learner.minibatch" in said, said


@pytest.mark.timeout(600)
def test_a_job_is_submitted_followed_and_stopped_with_its_summary_and_no_process_left(
    head, tmp_path
):
    at = ["--address", head.address]
    status, said = head(
        "ray", "job", "submit", *at, "--no-wait", "--submission-id", "first", "--working-dir", ".",
        "--runtime-env", "cluster/jobs/runtime_env.yaml", "--", "python", "-m", "cluster", "train",
        "bandit", f"run.dir={tmp_path}", "run.name=first", "learner.updates=100000",
    )  # fmt: skip
    assert status == 0, said
    follow = head.start("ray", "job", "logs", *at, "--follow", "first")
    metrics = tmp_path / "first" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 2000, 180,
             lambda: head("ray", "job", "logs", *at, "first")[1])  # fmt: skip
    assert head.ours()
    began = time.monotonic()
    status, said = head("ray", "job", "stop", *at, "first")
    assert status == 0 and "STOPPED" in said.upper(), said
    assert time.monotonic() - began < STOPPED_WITHIN
    out = summary(tmp_path, "first")
    assert out["status"] == "stopped" and out["recovery"]["signal"] == "SIGTERM"
    assert out["updates"] > 0 and list((tmp_path / "first" / "checkpoints").glob("batch-*"))
    ledger = out["ledger"]
    accounted = ledger["in_flight"] + ledger["queued"] + sum(ledger["retired"].values())
    assert ledger["issued"] == accounted
    followed = follow.communicate(timeout=60)[0]
    assert "ready after" in followed and "SIGTERM: stopping after a checkpoint" in followed
    wait_for(lambda: not head.ours(), 30, head.ours)


@pytest.mark.timeout(600)
def test_the_wrapper_submits_and_follows_to_the_end(head, tmp_path):
    status, said = head(
        "python", "-m", "cluster", "submit", "bandit", "--address", head.address,
        f"run.dir={tmp_path}", "run.name=whole", "learner.updates=20", "eval.samples=20",
    )  # fmt: skip
    assert status == 0, said
    assert "ray job stop" in said and "ready after" in said and "issued 200" in said
    out = summary(tmp_path, "whole")
    assert out["status"] == "finished" and out["updates"] == 20
    environment = (tmp_path / "whole" / "environment.json").read_text()
    assert head.environment["RAY_AUTH_TOKEN"] not in environment + said
    wait_for(lambda: not head.ours(), 30, head.ours)
