"""A whole run that pushes weights: Ray, the learner's worker, real vLLM; for NCCL a stand-in."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import kill_the_vllm_engine

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(600),
]
RUN = """
import sys, ray
from cluster.train import train
from configs.load import prepare
from configs.schema_vllm import Transfer

config = prepare("bandit_vllm", sys.argv[1:])
config.rollout.transfer = Transfer.nccl  # which the rules allow with GPUs only
hook = {"worker_process_setup_hook": "tests.stand_in.in_ray_worker"}
ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env=hook,
         logging_level="ERROR", log_to_driver=False)
print(train(config, "bandit_vllm")["status"])
"""


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    environment = dict(os.environ, PUSH_LOG=str(folder / "log"), PYTHONPATH=str(ROOT))
    environment.pop("RAY_ADDRESS", None)
    common = [f"run.dir={folder}", "run.name=pushed", "eval.samples=10", "eval.every=0"]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *common, *overrides], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def summary(run: subprocess.Popen, folder: Path) -> tuple[dict, list[str]]:
    try:
        output, _ = run.communicate(timeout=400)
    finally:
        run.terminate()
    assert run.returncode == 0, output
    out = json.loads((folder / "pushed" / "summary.json").read_text())
    assert out["status"] == "finished", output
    counts = out["ledger"]
    assert counts["issued"] == sum(counts["retired"].values()), "conservation"
    assert out["engine_mismatch_alarms"] == 0
    return out, (folder / "log").read_text().split("\n")[:-1]


def test_in_lockstep_the_first_version_goes_by_host_and_every_other_by_push(tmp_path):
    out, log = summary(start(tmp_path, "replay.inner_epochs=2", "learner.updates=10"), tmp_path)
    assert out["updates"] == 10 and out["age"]["max"] == 1
    assert log[:3] == ["host 0", "epoch 1 [0]", "push 2"]
    assert [line for line in log if line.startswith("host")] == ["host 0"]
    assert set(log[2:]) == {f"push {step}" for step in (2, 4, 6, 8, 10)}


def test_a_killed_actor_comes_back_by_host_and_the_group_is_built_anew(tmp_path):
    run = start(tmp_path, "replay.inner_epochs=1", "learner.updates=30")
    log_file = tmp_path / "log"
    kill_the_vllm_engine(run, lambda: log_file.exists() and "push 10" in log_file.read_text())
    out, log = summary(run, tmp_path)
    assert out["updates"] == 30
    hosts = [place for place, line in enumerate(log) if line.startswith("host")]
    epochs = [place for place, line in enumerate(log) if line.startswith("epoch")]
    assert len(hosts) >= 2 and log[hosts[0]] == "host 0"
    assert len(epochs) >= 2 and epochs[-1] > hosts[-1], "the newcomer is in an epoch of its own"
    assert log[-1] == "push 30"
