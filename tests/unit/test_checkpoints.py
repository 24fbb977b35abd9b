"""A checkpoint is whole or is passed over by name; a disk that refuses one does not stop a run."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.checkpoints import DRIVER, MANIFEST, BadCheckpoint, Checkpoints, driver_state, verify
from cluster.saver import Saver
from configs import faults
from learner.replay.journal import Journal, frames
from tests.harness import settings


def written(folder: Path, *batches: int, keep: int = 2) -> Checkpoints:
    """Checkpoints at these batches, of two files each."""
    checkpoints = Checkpoints(folder, keep)
    for batch in batches:
        part = checkpoints.begin(batch)
        (part / "learner").mkdir()
        (part / "learner" / "state.pt").write_bytes(os.urandom(5000))
        checkpoints.complete(part, {"batch": batch})
    return checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["learner/state.pt", DRIVER, MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage, name):
    checkpoints = written(tmp_path, 10, 20)
    damage(checkpoints.path(20) / name)
    said: list[str] = []
    newest = checkpoints.newest(said.append)
    assert newest == checkpoints.path(10) and driver_state(newest) == {"batch": 10}
    (line,) = said
    assert "passed over" in line and "batch-00000020" in line


def test_an_interrupted_write_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    checkpoints = written(tmp_path, 10)
    (checkpoints.begin(20) / "half").write_bytes(b"x")
    assert checkpoints.newest(print) == checkpoints.path(10)
    checkpoints.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["batch-00000010"]


def test_old_checkpoints_are_pruned_and_the_disk_is_bounded(tmp_path):
    checkpoints = written(tmp_path, 10, 20, 30, keep=2)
    assert checkpoints.prune() == 20 and checkpoints.batches() == [20, 30]


def test_a_manifest_never_leads_out_of_its_folder(tmp_path):
    checkpoints = written(tmp_path / "run", 10)
    outside = tmp_path / "secret"
    outside.write_text("x")
    path = checkpoints.path(10)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["../../secret"] = [1, "0" * 64]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadCheckpoint):
        verify(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_ends_the_journal_and_not_the_run(tmp_path):
    journal = Journal(tmp_path)
    journal.begin()
    journal.append({"do": "publish", "version": [0, 0]})
    journal._log = open("/dev/full", "wb")  # noqa: SIM115
    journal.append({"do": "publish", "version": [0, 1]})
    assert "No space left" in journal.broken
    journal.append({"do": "publish", "version": [0, 2]})
    journal.begin()
    assert not journal.broken
    assert len(list(frames(journal.log(1)))) == 1


class FakeParts:
    """Parts whose ranks and queue write at once, or say why not."""

    def __init__(self, trouble: Exception | None = None) -> None:
        self.trouble = trouble
        self.covered_up_to = -1

    def covered(self, batch: int) -> None:
        self.covered_up_to = batch


@pytest.fixture
def saver(tmp_path, monkeypatch) -> Any:
    """A saver over fake parts, and what it says."""
    said: list[str] = []
    config = settings("bandit", "checkpoint.every=10")
    parts: Any = FakeParts()
    parts.queue_written = lambda batch, folder: True
    parts.ranks_written = lambda: [True]

    def get(answers: list[Any]) -> list[Any]:
        if parts.trouble:
            raise parts.trouble
        return answers

    monkeypatch.setattr("ray.wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr("ray.get", get)
    checkpoints = Checkpoints(tmp_path, 2)
    saver = Saver(config, checkpoints, parts, said.append, lambda step, state: state)
    return SimpleNamespace(saver=saver, parts=parts, said=said, checkpoints=checkpoints)


def test_a_checkpoint_is_due_by_the_number_of_batches_and_one_at_a_time(saver):
    assert saver.saver.folder_for(5) == ""
    folder = saver.saver.folder_for(10)
    assert folder.endswith("batch-00000010.part")
    assert saver.saver.folder_for(20) == ""  # the other one is not taken yet
    saver.saver.took(folder, 10, 10, {"batch": 10})
    assert saver.saver.folder_for(20) == ""  # … and not written
    saver.saver.wait(10.0)
    assert saver.checkpoints.batches() == [10] and saver.parts.covered_up_to == 10
    assert saver.saver.folder_for(19) == "" != saver.saver.folder_for(20)


def test_a_part_that_cannot_be_written_costs_the_checkpoint_and_is_named(saver):
    saver.parts.trouble = OSError(errno.ENOSPC, "No space left on device")
    folder = saver.saver.folder_for(10)
    saver.saver.took(folder, 10, 10, {"batch": 10})
    saver.saver.wait(10.0)
    assert saver.checkpoints.batches() == [] and not Path(folder).exists()
    assert "no checkpoint at batch 10" in saver.said[0] and "No space left" in saver.said[0]
    saver.parts.trouble = None
    saver.saver.took(saver.saver.folder_for(20), 20, 20, {"batch": 20})
    saver.saver.wait(10.0)
    assert saver.checkpoints.batches() == [20]


def test_a_folder_that_cannot_be_made_is_named_and_the_run_goes_on(saver, monkeypatch):
    def refuse(self: Checkpoints, batch: int) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", "checkpoints")

    monkeypatch.setattr(Checkpoints, "begin", refuse)
    assert saver.saver.folder_for(10) == ""
    assert saver.said == ["no checkpoint at batch 10: Read-only file system: checkpoints"]


def test_a_fault_happens_once_in_a_run_whichever_process_comes_to_it(tmp_path):
    for _ in range(2):  # two processes, one after the other
        faults.install("learner.step.before@2:exception", str(tmp_path))
        faults.hit("learner.step.before")
        if not (tmp_path / "learner.step.before@2:exception").exists():
            with pytest.raises(faults.InjectedFault):
                faults.hit("learner.step.before")
        faults.hit("learner.step.before")
    faults.install("", "")
