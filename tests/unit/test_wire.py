"""Calls to the queue over its own connections: what is sent arrives as it was, and is answered."""

import pickle
import socket
import sys
import time
from typing import Any

import numpy as np
import pytest

from actors.rollout import concatenate
from benchmarks.queue_payload import block_of, columns
from learner.replay.line import TooManyFailures
from learner.replay.wire import frames
from tests import wire_process
from tests.wire_process import SOON, wire

connections, process = wire_process.connections, wire_process.process


@pytest.mark.parametrize("way", ["address", "remote"])
@pytest.mark.parametrize("size", [0, 1, 7, 1000, frames.JOINED])
def test_what_is_sent_arrives_with_its_arrays_aligned_and_of_ones_own(process, size, way):
    sent = {
        "bytes": np.arange(size).astype(np.uint8), "floats": np.random.default_rng(0).random(size)
    }  # fmt: skip
    with wire(getattr(process, way)) as calls:
        (back,) = calls.answer(calls.call("echo", sent))
        here = calls._socket.family == socket.AF_UNIX
        assert here == (way == "address" and sys.platform == "linux")
    for name, array in sent.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.aligned and back[name].flags.writeable
    assert sum(len(part) for part in frames.pack(1, sent)) > 9 * size


def test_frames_of_any_size_follow_each_other_and_none_keeps_anothers_memory(process):
    sizes = [0, 200_000, 5, 200_000, 190_000, 3, 1_000_000, 200_000]
    sent = [np.random.default_rng(size).random(size) for size in sizes]
    with wire(process.address) as calls:
        numbers = [calls.call("echo", array) for array in sent]
        back = [calls.answer(number)[0] for number in numbers]
    for array, (there,), here in zip(sent, process.service.seen, back):
        np.testing.assert_array_equal(there, array)
        np.testing.assert_array_equal(here, array)
        assert kept(there) < 1.2 * array.nbytes + 1000


def test_an_array_in_pieces_is_sent_as_they_lie_and_arrives_as_one(process):
    for lengths in ([100_001, 3, 50_000], [1, 2], [frames.PIECED, 0]):
        for dtype in ("<f4", "<i2"):
            whole = np.arange(sum(lengths)).astype(dtype)
            pieces = np.split(whole, np.cumsum(lengths)[:-1])
            sent = {"joined": frames.join(pieces), "after": np.arange(3.0)}
            buffers = frames.pack(1, sent)
            if whole.nbytes >= frames.PIECED:
                mine = [memoryview(part).obj for part in buffers]
                assert all(any(m is p.data.obj for m in mine) for p in pieces if len(p))
            size, count = frames.HEAD.unpack_from(buffers[0])[1:]
            body = bytearray(b"".join(buffers)[frames.HEAD.size :])
            assert len(body) == size
            back = frames.unpack(count, memoryview(body))
            np.testing.assert_array_equal(back["joined"], whole)
            np.testing.assert_array_equal(back["after"], np.arange(3.0))
            assert back["joined"].flags.aligned and back["joined"].dtype == whole.dtype


def test_pieces_of_two_kinds_are_joined_as_ever():
    pieces = [np.zeros(frames.PIECED, np.int16), np.ones(1, np.int32)]
    assert frames.join(pieces).dtype == np.int32


@pytest.mark.parametrize("tokens", [1, 50, 512, 2000, 10_000])
def test_a_batch_of_any_size_arrives_with_every_column_as_it_was(process, tokens):
    """Blocks that are one buffer, columns apart, and columns in pieces: of 16 to 160,000 tokens."""
    blocks = [block_of(1, tokens, seed) for seed in range(2)]
    for block in blocks:
        block.derived["reference_logp_K"] = block.logp_K + 1
    whole, sent = concatenate(blocks), concatenate(blocks, frames.join)
    with wire(process.address) as calls:
        (back,) = calls.answer(calls.call("echo", sent))
    for name, column in {**columns(whole), **whole.derived}.items():
        found = back.derived[name] if name in whole.derived else getattr(back, name)
        np.testing.assert_array_equal(found, column)
        assert found.dtype == column.dtype and found.flags.aligned


def test_pieces_that_are_sent_another_way_are_refused_rather_than_lost():
    pieces = frames.join([np.zeros(frames.PIECED), np.ones(1)])
    with pytest.raises(ValueError, match="frames only"):
        pickle.loads(pickle.dumps(pieces, 5))


def kept(array: np.ndarray) -> int:
    """Bytes that live as long as the array does."""
    base: Any = array
    while getattr(base, "base", None) is not None or isinstance(base, memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base.nbytes


def test_a_frame_may_come_in_any_pieces(process):
    address = process.address()
    frame = b"".join(frames.pack(7, ("echo", (np.arange(20),))))
    with socket.create_connection((address.host, address.port), SOON) as caller:
        theirs, ours = caller.recv(frames.NONCE), bytes(frames.NONCE)
        caller.sendall(ours + frames.proof(address.key, b"caller", theirs + ours))
        assert caller.recv(frames.PROOF) == frames.proof(address.key, b"queue", theirs + ours)
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in (
            1,
            frames.HEAD.size - 1,
            frames.HEAD.size,
            frames.HEAD.size + 1,
            len(frame) - 1,
        ):
            stream = 2 * frame
            for part in (stream[:cut], stream[cut : cut + len(frame)], stream[cut + len(frame) :]):
                caller.sendall(part)
                time.sleep(0.01)
        answers, size = b"", None
        while size is None or len(answers) < 10 * (frames.HEAD.size + size):
            answers += caller.recv(100_000)
            size = frames.HEAD.unpack_from(answers)[1]
    assert len(process.service.seen) == 10
    for (array,) in process.service.seen:
        np.testing.assert_array_equal(array, np.arange(20))


def test_answers_are_fetched_in_any_order_and_some_never(process):
    with wire(process.address) as calls:
        held, dropped = calls.call("wait", "long"), calls.call("wait", "dropped")
        assert calls.answer(calls.call("echo", 1)) == (1,)
        calls.forget(dropped)
        later = calls.call("echo", 2)
        calls.answer(calls.call("release"))
        assert calls.answer(held) == "long" and calls.answer(later) == (2,)
        assert not calls._answers and not calls._asked


def test_calls_begin_in_the_order_in_which_they_were_made(process):
    with wire(process.address) as calls:
        numbers = [calls.call("echo", n) for n in range(200)]
        assert [calls.answer(n)[0] for n in reversed(numbers)] == list(reversed(range(200)))
    assert process.service.seen == [(n,) for n in range(200)]


@pytest.mark.parametrize(
    "name, arguments, kind, words",
    [
        ("fail", (TooManyFailures("30 of 40"),), TooManyFailures, "30 of 40"),
        ("local", (), RuntimeError, "Local: only here"),
        ("close", (), KeyError, "close"),
        ("echo", (ValueError,), None, ""),
    ],
)
def test_what_a_call_raises_there_is_raised_here(process, name, arguments, kind, words):
    with wire(process.address) as calls:
        number = calls.call(name, *arguments)
        if kind is None:
            assert calls.answer(number) == arguments
        else:
            with pytest.raises(kind, match=words):
                calls.answer(number)
        assert calls.answer(calls.call("echo", 1)) == (1,)


class Unreadable:
    """Unpickles to an error."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_a_frame_that_cannot_be_read_is_an_answered_error(process):
    with wire(process.address) as calls, pytest.raises(ValueError, match="no number"):
        calls.answer(calls.call("echo", Unreadable()))


def test_what_failed_there_says_where(process):
    with wire(process.address) as calls, pytest.raises(TooManyFailures) as failed:
        calls.answer(calls.call("fail", TooManyFailures("30 of 40")))
    assert "in fail" in "".join(failed.value.__notes__)
