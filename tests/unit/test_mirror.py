"""A run's directory on object storage: what is there, how it came there, what is fetched."""

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster import mirror, run_directory
from cluster.checkpoints import Checkpoints
from cluster.mirror import Mirror
from cluster.stages.stage import run_stage
from configs.errors import ConfigError
from configs.load import to_yaml
from configs.schema import Config
from tests.harness import settings

REMOTE = "/bucket/runs/one"
OLD, NEW = "checkpoints/batch-00000001", "checkpoints/batch-00000002"


@pytest.fixture
def storage() -> Any:
    """Object storage, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's directory."""
    folder = tmp_path / "runs" / "one"
    write(folder, {"config.yaml": "c", "metrics.jsonl": "1", "run.lock": "", "journal/1": "j"})
    return folder


def config(run: Path, *more: str) -> Config:
    return settings("bandit", f"run.dir={run.parent}", f"run.name={run.name}",
                    "run.mirror=memory://bucket/runs", *more)  # fmt: skip


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def checkpoint(run: Path, batch: int, texts: dict[str, str]) -> None:
    """A whole one."""
    checkpoints = Checkpoints(run / "checkpoints", 2)
    part = checkpoints.begin(batch)
    write(part, texts)
    checkpoints.complete(part, {})


def held(storage: Any) -> dict[str, str]:
    """The copy's files, and what they say, but for the id."""
    names = [name for name in storage.find(REMOTE) if not name.endswith(mirror.OWNER)]
    return {name.removeprefix(f"{REMOTE}/"): storage.cat_file(name).decode() for name in names}


def test_the_newest_checkpoint_is_there_with_its_manifest_last_and_the_summary_after_all(
    storage, run, monkeypatch
):
    sent: list[str] = []
    put = storage.put_file

    def put_file(path: str, name: str) -> None:
        sent.append(name)
        put(path, name)

    monkeypatch.setattr(storage, "put_file", put_file)
    checkpoint(run, 1, {"a": "old"})
    checkpoint(run, 2, {"a": "new", "sub/z": "z"})
    checkpoint(run, 3, {"a": "damaged"})
    write(run, {"checkpoints/batch-00000003/a": "changed", "checkpoints/batch-00000004.part/a": "",
                "summary.json": "s", "checkpoints/step-9/hf/model": "w"})  # fmt: skip
    copy = Mirror(storage, REMOTE, run, print)
    copy.push()
    assert [name.removeprefix(f"{REMOTE}/") for name in sent] == [
        "config.yaml", "metrics.jsonl", "checkpoints/step-9/hf/model", f"{NEW}/a",
        f"{NEW}/driver.json", f"{NEW}/sub/z", f"{NEW}/manifest.json", "summary.json",
    ]  # fmt: skip
    sent.clear()
    write(run, {"metrics.jsonl": "12"})
    shutil.rmtree(run / OLD)
    copy.push()
    assert sent == [f"{REMOTE}/metrics.jsonl"]
    assert f"{NEW}/manifest.json" in held(storage)
    assert not list(run.rglob("*.part/sub"))  # the links are gone


def test_what_is_no_longer_here_goes_once_all_else_is_there(storage, run, monkeypatch):
    checkpoint(run, 1, {"a": "1"})
    copy = Mirror(storage, REMOTE, run, print)
    copy.push()
    shutil.rmtree(run / OLD)
    checkpoint(run, 2, {"a": "2"})

    def full(path: str, name: str) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_file", full)
        with pytest.raises(OSError, match="no room"):
            copy.push()
    assert f"{OLD}/manifest.json" in held(storage)
    copy.push()
    assert {name for name in held(storage) if name.startswith("checkpoints")} == {
        f"{NEW}/a", f"{NEW}/driver.json", f"{NEW}/manifest.json"
    }  # fmt: skip


def test_a_directory_that_has_gone_takes_nothing_with_it(storage, run):
    copy = Mirror(storage, REMOTE, run, print)
    copy.push()
    before = held(storage)
    shutil.rmtree(run)
    copy.push()
    run.mkdir()  # where its disk was mounted
    copy.push()
    assert held(storage) == before and before


def test_a_run_that_is_only_there_is_fetched_and_its_former_directory_refused(storage, run):
    checkpoint(run, 2, {"a": "a"})
    with mirror.kept(config(run), run, print):
        pass
    assert "journal/1" not in held(storage)
    former = run.with_name("former")
    run.rename(former)
    still_there = Mirror(storage, REMOTE, former, print)
    still_there.push()
    mirror.meet(config(run), run)
    assert (run / NEW / "a").read_text() == "a" and (run / "config.yaml").read_text() == "c"
    still_there.push()  # nothing has begun elsewhere
    write(run, {"metrics.jsonl": "elsewhere"})
    with mirror.kept(config(run), run, print):
        mirror.meet(config(run), run)  # its own
    with pytest.raises(RuntimeError, match="taken over"):
        still_there.push()
    assert held(storage)["metrics.jsonl"] == "elsewhere"
    shutil.rmtree(run)
    former.rename(run)  # the machine that was given up comes back with its disk
    with pytest.raises(ConfigError, match="is not the copy of"):
        mirror.meet(config(run), run)


def test_a_start_that_was_broken_off_has_its_copy_still(storage, run):
    with mirror.kept(config(run), run, print):
        pass
    run_directory.admit(run, config(run))  # without a checkpoint there is nothing to go on with
    assert [path.name for path in run.iterdir()] == [mirror.OWNER]
    assert run_directory.choose(config(run), "bandit") == run
    Mirror(storage, REMOTE, run, print).push()


def test_beginning_anew_writes_over_an_unfinished_run_and_not_over_a_finished_one(storage, run):
    def lose() -> None:
        with mirror.kept(config(run), run, print):
            pass
        shutil.rmtree(run)

    lose()
    mirror.meet(config(run, "resume=never"), run)
    assert not run.exists()
    write(run, {"summary.json": "finished"})
    lose()
    mirror.meet(config(run, "resume=never"), run)  # here again, to be refused as finished
    assert (run / "summary.json").exists()
    (run / "summary.json").unlink()  # a run that goes on
    write(run, {"config.yaml": "c"})
    Mirror(storage, REMOTE, run, print).push()
    assert "summary.json" not in held(storage)


def test_a_finished_stage_is_fetched_and_not_run_again(storage, tmp_path):
    given = settings("length_min", f"run.dir={tmp_path}", "run.mirror=memory://bucket/runs")
    sft = tmp_path / "length" / "sft"
    write(sft, {"config.yaml": to_yaml(given), "hf/model": "w"})
    write(sft, {"summary.json": '{"status": "finished"}'})
    with mirror.kept(given, sft, print):
        pass
    shutil.rmtree(tmp_path / "length")
    assert run_stage(given, "sft", sft) == {"status": "finished"}
    assert (sft / "hf" / "model").read_text() == "w"


def test_a_folder_that_no_run_made_is_not_written_to(storage, run):
    storage.pipe_file(f"{REMOTE}/holiday.jpg", b"")
    with pytest.raises(ConfigError, match="is not the copy of"):
        mirror.meet(config(run), run)
    mirror.meet(config(run.with_name("two")), run.with_name("two"))
    assert list(held(storage)) == ["holiday.jpg"]


def test_what_lies_outside_the_run_is_not_written(storage, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "one"
    storage.pipe_file(f"{REMOTE}/{mirror.OWNER}", b"id")
    own = f"{REMOTE}/{mirror.OWNER}"
    monkeypatch.setattr(storage, "find", lambda remote: [own, f"{remote}/../../../evil"])
    with pytest.raises(ConfigError, match="outside the run"):
        mirror.meet(config(run), run)
    assert not run.exists() and not (tmp_path / "evil").exists()


def test_a_storage_that_fails_is_said_once_and_again_at_the_end(storage, run):
    said: list[str] = []
    copy = Mirror(storage, REMOTE, run, said.append)
    copy.files = None
    copy._try()
    copy._try()
    assert len(said) == 1 and said[0].startswith("run.mirror: AttributeError")
    copy.end.set()
    copy.run()
    assert len(said) == 2
    copy.files = storage
    copy.run()
    assert held(storage)["metrics.jsonl"] == "1" and len(said) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["run.name=", "run.mirror=memory://bucket"], "needs a name"),
        (["run.mirror=nowhere://bucket"], "nowhere"),
        (["run.mirror=file:///proc/1/none"], "file:///proc/1/none"),
    ],
)
def test_a_mirror_that_cannot_be_written_is_refused_before_anything_starts(given, says):
    with pytest.raises(ConfigError, match=says) as refused:
        mirror.check(settings("bandit", "run.name=one", *given))
    assert "\n" not in str(refused.value)
