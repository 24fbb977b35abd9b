"""A run's directory on object storage: what is there, how it came there, what is fetched."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster import mirror
from configs.errors import ConfigError
from configs.schema import Config
from tests.harness import settings

REMOTE = "/bucket/runs/one"


@pytest.fixture
def storage() -> Any:
    """Object storage, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


@pytest.fixture
def config(tmp_path) -> Config:
    return settings("bandit", f"run.dir={tmp_path}/runs", "run.name=one",
                    "run.mirror=memory://bucket/runs")  # fmt: skip


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def held(storage: Any) -> dict[str, str]:
    """The copy's files, and what they say."""
    names = storage.find(REMOTE)
    return {name.removeprefix(f"{REMOTE}/"): storage.cat_file(name).decode() for name in names}


def test_the_copy_is_what_changed_and_in_the_order_that_makes_it_whole(storage, tmp_path):
    sent: list[str] = []
    put = storage.put_file
    storage.put_file = lambda path, name: (sent.append(Path(name).name), put(path, name))
    try:
        copy = mirror.Mirror(storage, REMOTE, tmp_path, print)
        write(tmp_path, summary_json="s", checkpoints__b1__manifest_json="m", metrics="1",
              checkpoints__b1__a="a", journal__1="j")  # fmt: skip
        write(tmp_path, **{"run.lock": "", "faults__x": "", "checkpoints__b2.part__a": "half"})
        assert copy.push()
        assert sent == ["1", "metrics", "a", "manifest.json", "summary.json"]
        sent.clear()
        write(tmp_path, metrics="12")
        (tmp_path / "journal" / "1").unlink()
        assert copy.push() and sent == ["metrics"]
    finally:
        del storage.put_file
    assert held(storage) == {"metrics": "12", "checkpoints/b1/a": "a", "summary.json": "s",
                             "checkpoints/b1/manifest.json": "m"}  # fmt: skip


def test_nothing_is_removed_there_before_all_else_is_there(storage, tmp_path, monkeypatch):
    copy = mirror.Mirror(storage, REMOTE, tmp_path, print)
    write(tmp_path, checkpoints__b1__a="old")
    assert copy.push()
    (tmp_path / "checkpoints" / "b1" / "a").unlink()
    write(tmp_path, checkpoints__b2__a="new")
    files = mirror._files
    gone = {"journal/7": (1, 1)}  # listed, and pruned before its turn came
    monkeypatch.setattr(mirror, "_files", lambda folder: files(folder) | gone)
    assert not copy.push()
    assert held(storage) == {"checkpoints/b1/a": "old", "checkpoints/b2/a": "new"}
    monkeypatch.undo()
    assert copy.push() and held(storage) == {"checkpoints/b2/a": "new"}


def test_a_run_that_is_only_there_is_fetched_whole_and_one_that_is_here_is_left(
    storage, config, tmp_path
):
    run = tmp_path / "runs" / "one"
    write(run, **{"config.yaml": "c", "checkpoints__b1__a": "a"})
    with mirror.kept(config, run, print):
        pass
    before = held(storage)
    run.rename(tmp_path / "elsewhere")
    mirror.fetch(config, run)
    assert (run / "checkpoints/b1/a").read_text() == "a" and (run / "config.yaml").exists()
    (run / "config.yaml").write_text("mine")
    mirror.fetch(config, run)
    assert (run / "config.yaml").read_text() == "mine" and held(storage) == before
    never = settings("bandit", f"run.dir={tmp_path}/other", "run.name=one", "resume=never",
                     "run.mirror=memory://bucket/runs")  # fmt: skip
    mirror.fetch(never, tmp_path / "other" / "one")
    assert not (tmp_path / "other").exists()


def test_what_lies_outside_the_run_is_not_written(storage, config, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "find", lambda remote: [f"{remote}/../../../evil"])
    with pytest.raises(ConfigError, match="evil"):
        mirror.fetch(config, tmp_path / "runs" / "one")


def test_a_storage_that_fails_is_said_once_and_again_at_the_end(storage, tmp_path):
    said: list[str] = []
    copy = mirror.Mirror(storage, REMOTE, tmp_path, said.append)
    write(tmp_path, metrics="1")
    copy.files = None
    copy._try()
    copy._try()
    assert len(said) == 1 and said[0].startswith("run.mirror: AttributeError")
    copy.end.set()
    copy.run()
    assert len(said) == 2
    copy.files = storage
    copy.run()
    assert held(storage) == {"metrics": "1"} and len(said) == 2


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
