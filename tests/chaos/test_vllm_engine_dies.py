"""vLLM's engine process is killed in mid-run: the actor comes back and the ledger balances."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import kill_the_vllm_engine

UPDATES = 100
ROOT = Path(__file__).parents[2]


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.timeout(800)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_killed_engine_process_costs_a_restart_and_no_rollout(tmp_path):
    overrides = [f"run.dir={tmp_path}", "run.name=killed", f"learner.updates={UPDATES}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "cluster", "train", "bandit_vllm", *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )  # fmt: skip
    try:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        kill_the_vllm_engine(run, ready=lambda: lines(metrics) >= 10)
        output, _ = run.communicate(timeout=400)
    finally:
        run.terminate()
    assert run.returncode == 0, output
    assert "rollout actor 0 restarted, 1 lease(s) issued again" in output
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    ledger = summary["ledger"]
    assert summary["status"] == "finished" and summary["updates"] == UPDATES
    assert ledger["issued"] == 10 * UPDATES == ledger["retired"]["exhausted"]
    assert ledger["in_flight"] == ledger["queued"] == 0
    assert summary["age"]["max"] == 9 and summary["engine_mismatch_alarms"] == 0
    # What the torch engine reaches too: docs/runs.md.
    assert summary["reward_eval"] > 0.97 and summary["engine_mismatch_kl"] <= 1e-5
