"""A machine is lost with its disk: the run goes on elsewhere from its mirror."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from cluster import mirror
from cluster.checkpoints import MANIFEST
from cluster.mirror import Mirror
from cluster.train import train
from configs.load import prepare

UPDATES = 150


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_whose_directory_is_lost_goes_on_from_its_mirror_bit_for_bit(
    crew, tmp_path, monkeypatch
):
    monkeypatch.setattr(mirror, "SECONDS", 0.2)
    push = Mirror.push

    def until_the_machine_is_lost(self: Mirror) -> None:
        if not any(name.endswith(MANIFEST) for name in self._sent):
            push(self)

    def run() -> dict:
        config = prepare("bandit", [
            f"run.dir={tmp_path}", "run.name=one", "run.mirror=memory://bucket/runs",
            f"learner.updates={UPDATES}", "replay.inner_epochs=2", "checkpoint.every=20",
            "checkpoint.seconds=0", "eval.every=50",
        ])  # fmt: skip
        return train(config, "bandit", crew)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "push", until_the_machine_is_lost)
        assert run()["status"] == "finished"
    expected = losses(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")

    summary = run()
    assert summary["status"] == "finished" and 20 <= summary["recovery"]["resumed_at"] < UPDATES
    assert losses(tmp_path / "one") == expected and len(expected) == UPDATES
    # What came after the checkpoint is unknown here: neither issued nor rolled back.
    ledger = summary["ledger"]
    assert ledger["retired"]["exhausted"] == ledger["issued"] == UPDATES * 100 // 2
    assert ledger["in_flight"] == ledger["queued"] == 0
    files = fsspec.filesystem("memory")
    there = {name.removeprefix("/bucket/runs/one/") for name in files.find("/bucket/runs/one")}
    here = {str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*")
            if p.is_file() and p.name != "run.lock" and "batch-" not in str(p)}  # fmt: skip
    checkpoints = {name for name in there if "/batch-" in name}
    assert there - checkpoints == here and "summary.json" in there
    assert any(name.endswith(MANIFEST) for name in checkpoints)
    with pytest.raises(ValueError, match="is finished"):
        run()
