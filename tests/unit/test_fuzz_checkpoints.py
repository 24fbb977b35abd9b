"""Whatever became of a checkpoint's files: what was written, or a line that says what is wrong."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st

from actors.actor import Lease
from actors.codec import DamagedError, block_from, block_tree, decode, encode
from actors.rollout import REWARD_FAILED, GroupId, Version, concatenate
from cluster.checkpoints import DRIVER, MANIFEST, BadCheckpoint, Checkpoints, driver_state, verify
from learner.replay.journal import Journal, frames, read_base, read_head, write_base, write_frame
from tests.fuzz import VALUES, assert_one_line, fuzz, json_text, mutated, mutated_tree, trial
from tests.queues import answer

BLOCK = answer(Lease(3, (GroupId(5, 0), GroupId(6, 1)), Version(0, 2)), 2, {1: REWARD_FAILED})
TREE = {"a": np.arange(3), "b": [1, None, "x", np.float32([0.5, np.nan])], "c": block_tree(BLOCK)}
ENCODED = encode(TREE)
HEADER_LENGTH = int.from_bytes(ENCODED[:8], "little")
HEADER = json.loads(ENCODED[8 : 8 + HEADER_LENGTH])
SOME_DTYPES = st.sampled_from(
    ["I64", "F32", "BF16", "F8_E4M3", "F8_E8M0", "U64", "BOOL", "F4", "C64", "F64", "U8", "F6_E2M3"]
)
FEW = st.integers(-1, 300) | st.lists(st.integers(0, 9), max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


# --- the codec -------------------------------------------------------------------------------


def decodes(data: bytes) -> None:
    """A tree, of which a block can be made or not; or DamagedError."""
    try:
        tree = decode(data)
        if isinstance(tree, dict) and isinstance(tree.get("c"), dict):
            block = block_from(tree["c"])
            assert concatenate([block.select(g, g + 1) for g in range(block.groups)])
            assert len(block.oldest_step_N()) == block.groups * block.members
    except DamagedError as error:
        assert_one_line(str(error), 400)


@fuzz(400, data=mutated(ENCODED) | mutated(encode({"x": 1})) | st.binary(max_size=60))
def test_any_bytes_decode_or_are_damaged(data: bytes) -> None:
    with trial("checkpoints: codec"):
        decodes(data)


@fuzz(300, header=mutated_tree(HEADER, FEW | VALUES | SOME_DTYPES), cut=st.integers(-9, 9))
def test_any_header_decodes_or_is_damaged(header: Any, cut: int) -> None:
    text = json_text(header).encode()
    text += b" " * (-len(text) % 8)
    body = ENCODED[8 + HEADER_LENGTH :]
    body = body[:cut] if cut < 0 else body + bytes(cut)
    with trial("checkpoints: codec"):
        decodes(struct.pack("<Q", len(text)) + text + body)


@fuzz(200, tree=mutated_tree(TREE, FEW | VALUES | st.builds(np.arange, st.integers(0, 9))))
def test_any_tree_is_a_block_or_is_damaged(tree: Any) -> None:
    data = encode(tree)
    with trial("checkpoints: codec"):
        decodes(data)


# --- the journal -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(folder: Path) -> bytes:
    write_base(folder / "000001.base", 7, "cut", {"state": TREE})
    return (folder / "000001.base").read_bytes()


@fuzz(250, data=st.data())
def test_a_damaged_file_of_frames_gives_what_was_before_the_damage(
    folder: Path, base: bytes, data: st.DataObject
) -> None:
    path = folder / "000002.base"
    path.write_bytes(data.draw(mutated(base)))
    with trial("checkpoints: journal"):
        found = list(frames(path))
        try:
            assert read_head(path) == (7, "cut")
            assert read_base(path)[0] == 7
        except DamagedError as error:
            assert_one_line(str(error), 600)
            assert len(found) < 2
    if path.read_bytes() == base:
        assert len(found) == 2


@fuzz(150, trees=st.lists(VALUES | st.fixed_dictionaries({"batch": VALUES}), max_size=3))
@example(trees=[{"batch": True}])
def test_frames_of_anything_have_a_head_or_are_damaged(folder: Path, trees: list[Any]) -> None:
    path = folder / "000003.base"
    with path.open("wb") as file:
        for tree in trees:
            write_frame(file, tree)
    with trial("checkpoints: journal"):
        try:
            batch, kind = read_head(path)
            assert type(batch) is int and isinstance(kind, str)
            read_base(path)
        except DamagedError as error:
            assert_one_line(str(error), 600)


@fuzz(40, name=st.text(max_size=6) | st.sampled_from(["²", "٣", "-1", "1e3", "000009", "９"]))
@example(name="²")  # a digit to Python, and no number
def test_a_journals_folder_may_hold_files_of_any_name(folder: Path, name: str) -> None:
    place = folder / "journal"
    shutil.rmtree(place, ignore_errors=True)
    journal = Journal(place)
    try:
        (place / f"{name}.base").touch()
    except (OSError, ValueError):
        return  # no name for a file
    with trial("checkpoints: journal"):
        assert all(journal.base(number).exists() for number in journal.numbers())


# --- folders ---------------------------------------------------------------------------------

FILES = {DRIVER: b'{"batch": 4}', "queue.base": ENCODED[:200], "learner/rank0.bin": b"w" * 99}
DIGESTS = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in FILES.items()}
SECRET = b"not a part of it"
OUTSIDE = [len(SECRET), hashlib.sha256(SECRET).hexdigest()]
LEADING_OUT = ["../secret", "../../checkpoints/secret", "learner/../../secret", "link"]
NAMES = [*FILES, MANIFEST]
ODD_ENTRIES = st.sampled_from([[float("inf"), "x"], [-1, ""], ["12", None], "ab", {}, [1], 3, None])
ODD_NAMES = st.sampled_from(["", ".", "..", "\x00", "\ud800", "/", "learner", "x" * 300, "a\nb"])


def fresh(folder: Path) -> Checkpoints:
    """Two whole checkpoints, with a file beside that is no part of them."""
    place = folder / "run" / "checkpoints"
    shutil.rmtree(place, ignore_errors=True)
    kept = Checkpoints(place, 2)
    for batch in (2, 4):
        part = kept.begin(batch)
        (part / "learner").mkdir()
        for name, data in FILES.items():
            (part / name).write_bytes(data)
        kept.complete(part, {"batch": batch})
    (place / "secret").write_bytes(SECRET)
    return kept


@st.composite
def damages(draw: Callable[..., Any]) -> Callable[[Path], None]:
    """Something that happens to a checkpoint's folder."""
    name = draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(["bytes", "gone", "folder", "fifo", "link", "manifest", "entries"]))
    content = draw(mutated(FILES.get(name, b"{}")) | st.binary(max_size=20))
    manifest = draw(mutated_tree(DIGESTS, VALUES | ODD_ENTRIES) | VALUES | ODD_ENTRIES)
    entries = draw(st.dictionaries(ODD_NAMES, ODD_ENTRIES | st.just([0, "x"]), max_size=2))
    text = draw(st.sampled_from([None, "[" * 100_000, '{"a": [1e999, 1]}', "\ufeff{}", ""]))

    def damage(path: Path) -> None:
        file = path / name
        if kind in ("gone", "folder", "fifo", "link"):
            file.unlink(missing_ok=True)
        match kind:
            case "bytes":
                file.write_bytes(content)
            case "folder":
                file.mkdir()
            case "fifo":
                os.mkfifo(file)
            case "link":
                file.symlink_to(path.parent / "secret")
            case "manifest":
                written = json_text(manifest) if text is None else text
                (path / MANIFEST).write_text(written, encoding="utf-8")
            case "entries":
                true = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                (path / MANIFEST).write_text(json_text(true | entries), encoding="utf-8")

    return damage


def read(kept: Checkpoints, batch: int) -> None:
    """Whole, with a state; or BadCheckpoint of one line."""
    try:
        verify(kept.path(batch))
        assert isinstance(driver_state(kept.path(batch)), dict)
    except BadCheckpoint as error:
        assert_one_line(str(error), 600)


@fuzz(150, damage=damages())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    kept, said = fresh(folder), []
    damage(kept.path(4))
    with trial("checkpoints: folders"):
        read(kept, 4)
        newest = kept.newest(said.append)
    assert newest == kept.path(2) if said else newest == kept.path(4)
    assert len(said) <= 1
    for line in said:
        assert_one_line(line, 700)
        assert kept.path(4).name in line


@fuzz(100, name=st.sampled_from(LEADING_OUT), absolute=st.booleans(), whole=st.booleans())
def test_a_manifest_leads_to_no_file_outside(
    folder: Path, name: str, absolute: bool, whole: bool
) -> None:
    kept = fresh(folder)
    path = kept.path(4)
    (path / "link").symlink_to(path.parent / "secret")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    named = str(path.parent / "secret") if absolute else name
    (path / MANIFEST).write_text(json_text((manifest if whole else {}) | {named: OUTSIDE,
                                 DRIVER: manifest[DRIVER]}))  # fmt: skip
    with trial("checkpoints: folders"), pytest.raises(BadCheckpoint) as caught:
        verify(path)
    assert_one_line(str(caught.value), 600)
