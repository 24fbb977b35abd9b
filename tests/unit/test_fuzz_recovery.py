"""Whatever became of the queue's journal: a queue whose books balance, or none."""

import asyncio
import functools
import io
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from actors.codec import DamagedError, decode, encode
from learner.replay import recovery, snapshot
from learner.replay.journal import Journal, write_frame
from learner.replay.queue import ReplayQueue
from tests.fuzz import VALUES, assert_one_line, fuzz, mutated, mutated_tree, trial
from tests.recovery import Play, cut, same, service, state

OPERATIONS = 25  # between the cuts


@functools.cache
def story(ready: bool) -> tuple[dict[str, bytes], Callable[[], ReplayQueue], dict[str, Any]]:
    """The files of a real journal, what makes its queue, and the state that it ends in."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        async def live() -> tuple[Callable[[], ReplayQueue], dict[str, Any]]:
            play = Play(service(folder, ready_order=ready), 3)
            await play.publish()
            await play.many(2 * OPERATIONS)
            await cut(play, folder / "cut")
            await play.many(OPERATIONS)
            await play.queue.roll_back(str(folder / "cut"), False)
            play.lineage, play.leases = play.queue.queue.version.lineage, []
            await play.publish()
            await play.many(OPERATIONS)
            return play.queue._new, state(play.queue.queue)

        new, end = asyncio.run(live())
        files = {path.name: path.read_bytes() for path in (folder / "journal").iterdir()}
    return files, new, end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals") / "journal"


def write(folder: Path, files: dict[str, bytes]) -> Journal:
    shutil.rmtree(folder, ignore_errors=True)
    journal = Journal(folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return journal


def recovers(new: Callable[[], ReplayQueue], journal: Journal, batch: int | None) -> None:
    """A queue whose books balance and agree with what it holds, or none."""
    queue = recovery.recover(new, journal, batch)
    if queue is None:
        return
    ledger, waiting = queue.ledger, queue.line.groups.values()
    assert ledger.balanced and ledger.counts()
    held = [h for h in [*waiting, *queue.held.values()] if h is not None]
    assert ledger.in_flight == queue.plan.members * sum(h is None for h in waiting)
    assert ledger.queued == sum(h.valid for h in held)


def goes_on(new: Callable[[], ReplayQueue], journal: Journal) -> None:
    """What a restarted process does first works."""
    queue = recovery.recover(new, journal)
    if queue is not None:
        decode(encode(snapshot.take(queue)))
        queue.release(None, blame=False)
        queue.weights.clear()
        queue.publish(queue.version, ["w"])
        queue.lease(0)
        queue.missing(queue.committed)
        assert queue.ledger.balanced


@pytest.mark.parametrize("ready", [False, True])
def test_the_journal_that_is_damaged_here_gives_the_whole_state_when_it_is_not(
    folder: Path, ready: bool
) -> None:
    files, new, end = story(ready)
    queue = recovery.recover(new, write(folder, files))
    assert queue is not None and same(state(queue), end)
    assert queue.ledger.queued > 0 and queue.ledger.in_flight > 0 and len(files) >= 6


# --- damaged bytes ---------------------------------------------------------------------------


@st.composite
def damaged(draw: Callable[..., Any], files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with one or two of them changed, exchanged or gone."""
    files = dict(files)
    for _ in range(draw(st.integers(1, 2))):
        name, other = draw(st.sampled_from(sorted(files))), draw(st.sampled_from(sorted(files)))
        kind = draw(st.sampled_from(["bytes", "bytes", "bytes", "gone", "other"]))
        files[name] = {
            "bytes": lambda name=name: draw(mutated(files[name])),
            "gone": lambda: b"",
            "other": lambda other=other: files[other],
        }[kind]()
    return files


@fuzz(150, data=st.data(), ready=st.booleans(), batch=st.none() | st.integers(0, 9))
def test_a_damaged_journal_gives_a_queue_that_balances(
    folder: Path, data: st.DataObject, ready: bool, batch: int | None
) -> None:
    files, new, _ = story(ready)
    journal = write(folder, data.draw(damaged(files)))
    with trial("checkpoints: recovery"):
        recovers(new, journal, batch)
        goes_on(new, journal)


# --- whole frames that say something else ----------------------------------------------------


def framed(trees: list[Any]) -> bytes:
    file = io.BytesIO()
    for tree in trees:
        write_frame(file, tree)  # type: ignore[arg-type]
    return file.getvalue()


def trees_of(data: bytes) -> list[Any]:
    trees, at = [], 0
    while at < len(data):
        length, crc = struct.unpack_from("<QI", data, at)
        payload = data[at + 12 : at + 12 + length]
        assert zlib.crc32(payload) == crc
        trees.append(decode(payload))
        at += 12 + length
    return trees


@functools.cache
def frames_of(ready: bool) -> dict[str, list[Any]]:
    return {name: trees_of(data) for name, data in story(ready)[0].items()}


ARRAYS = st.builds(
    lambda values, dtype: np.array(values).astype(dtype),
    st.lists(st.integers(-2, 9), max_size=8),
    st.sampled_from(["int64", "int32", "float32", "uint8", "bool", "int8"]),
)
HUGE = st.sampled_from([np.array([0, 2**62]), np.array([0, 5, 2]), np.zeros((2, 2))])
PLAUSIBLE = st.integers(-2, 12) | ARRAYS | HUGE | VALUES | st.lists(st.integers(-1, 9), max_size=4)


@st.composite
def retold(draw: Callable[..., Any], ready: bool) -> dict[str, bytes]:
    """The files, in one of which a frame says something else, or comes elsewhere, or not at all."""
    files = dict(story(ready)[0])
    name = draw(st.sampled_from(sorted(files)))
    trees = list(frames_of(ready)[name])
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, max(0, len(trees) - 1)))
        match draw(st.sampled_from(["change", "change", "change", "drop", "again", "later"])):
            case "change" if trees:
                trees[place] = draw(mutated_tree(trees[place], PLAUSIBLE))
            case "drop":
                del trees[place : place + 1]
            case "again":
                trees[place:place] = trees[place : place + 1]
            case "later":
                trees.append(trees.pop(place) if trees else {})
    return files | {name: framed(trees)}


@fuzz(200, data=st.data(), ready=st.booleans(), batch=st.none() | st.integers(0, 9))
def test_a_journal_that_says_something_else_gives_a_queue_that_balances(
    folder: Path, data: st.DataObject, ready: bool, batch: int | None
) -> None:
    journal = write(folder, data.draw(retold(ready)))
    with trial("checkpoints: recovery"):
        recovers(story(ready)[1], journal, batch)


@fuzz(200, data=st.data(), ready=st.booleans())
def test_a_state_that_says_something_else_is_refused_or_balances(
    data: st.DataObject, ready: bool
) -> None:
    base = data.draw(st.sampled_from([n for n in sorted(story(ready)[0]) if n.endswith(".base")]))
    tree = decode(encode(data.draw(mutated_tree(frames_of(ready)[base][1], PLAUSIBLE))))
    with trial("checkpoints: recovery"):
        try:
            queue = recovery.restored(story(ready)[1], tree)
        except DamagedError as error:
            assert_one_line(str(error), 400)
            return
        assert queue.ledger.balanced
