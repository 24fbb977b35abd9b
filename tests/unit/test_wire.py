"""Calls to the queue over its own connections: what arrives, who is let in, what a break costs."""

import asyncio
import errno
import os
import pickle
import socket
import ssl
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from actors.rollout import concatenate
from benchmarks.queue_payload import block_of, columns
from learner.replay.line import TooManyFailures
from learner.replay.wire import client, frames, server
from learner.replay.wire.client import Wire
from learner.replay.wire.frames import Address
from learner.replay.wire.server import Server
from tests.certificates import authority

HOST, SOON = "127.0.0.1", 20.0
CONNECTIONS: defaultdict[Server, list[Any]] = defaultdict(list)


class Service:
    """Calls to try: one that waits until it is told to go on, others that answer at once."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.go = asyncio.Event()

    async def echo(self, *arguments: Any) -> Any:
        self.seen.append(arguments)
        return arguments

    async def wait(self, what: str) -> str:
        self.seen.append(what)
        await self.go.wait()
        return what

    async def release(self) -> None:
        self.go.set()

    async def fail(self, error: Exception) -> None:
        raise error

    async def local(self) -> None:
        raise Local("only here")

    def calls(self, at_once: bool) -> dict[str, Any]:
        """at_once: all but `wait` answer without an awaitable."""
        found = {name: getattr(self, name) for name in ("echo", "release", "fail", "local")}
        if at_once:
            found = {name: without_a_wait(call) for name, call in found.items()}
        return {"wait": self.wait, **found}


def without_a_wait(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same as a plain function."""

    def answer(*arguments: Any) -> Any:
        try:
            call(*arguments).send(None)
        except StopIteration as ended:
            return ended.value

    return answer


class Local(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("stays where it is")


class Process:
    """A service's loop in a thread, that ends as a process does: connections and all."""

    def __init__(
        self, new_loop: Any = asyncio.new_event_loop, at_once: bool = False
    ) -> None:  # fmt: skip
        self.service, self.server = Service(), Server({})
        self.loop = new_loop()
        self.server.calls = self.service.calls(at_once)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def do(self, what: Any) -> Any:
        call: Future[Any] = asyncio.run_coroutine_threadsafe(what, self.loop)
        return call.result(SOON)

    def address(self) -> Address:
        return self.do(self.server.address(HOST))

    def remote(self) -> Address:
        return self.address()._replace(local="")

    def end(self) -> None:
        async def close() -> None:
            self.server.server.close()
            if hasattr(self.server, "local"):
                self.server.local.close()
            for connection in CONNECTIONS.pop(self.server, []):
                connection.transport.abort()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        if self.loop.is_running():
            if self.server._listening is not None:
                self.do(close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(SOON)


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Every connection of a server, by server; and no pause between attempts to connect."""
    monkeypatch.setattr(client, "AGAIN_SECONDS", 0.01)
    made = server._Connection.connection_made

    def connection_made(self: Any, transport: Any) -> None:
        CONNECTIONS[self.server].append(self)
        made(self, transport)

    monkeypatch.setattr(server._Connection, "connection_made", connection_made)


@pytest.fixture(params=["asyncio", "uvloop", "uvloop, at once"])
def process(request) -> Iterator[Process]:
    loop, *at_once = request.param.split(", ")
    loops = pytest.importorskip(loop)  # Ray's actors run on uvloop where it is
    found = Process(loops.new_event_loop, bool(at_once))
    yield found
    found.end()


LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@contextmanager
def wire(find: Callable[[], Address]) -> Iterator[Wire]:
    made = Wire(find)
    yield made
    made.close()


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


def test_a_call_without_a_word_ends_at_its_limit(process):
    words = "no answer of the replay queue for 0.2 s"
    with wire(process.address) as calls, pytest.raises(TimeoutError, match=words):
        calls.answer(calls.call("wait", "long"), 0.2)


def test_a_process_that_nobody_finds_is_no_wait_without_end(process):
    gone = process.address()
    process.end()
    words = "no connection to the replay queue for 0.2 s"
    with wire(lambda: gone) as calls, pytest.raises(TimeoutError, match=words):
        calls.answer(calls.call("echo", 1), 0.2)


def test_what_says_that_the_process_is_gone_for_good_is_raised():
    def find() -> Address:
        raise LookupError("used up its restarts")

    with wire(find) as calls, pytest.raises(LookupError, match="used up"):
        calls.answer(calls.call("echo", 1))


def test_what_a_dead_process_did_not_answer_its_successor_is_asked_again(process):
    now = [process]
    with wire(lambda: now[0].address()) as calls:
        answered, first = calls.call("echo", 0), calls.call("wait", "first")
        second = calls.call("wait", "second")
        assert calls.answer(answered) == (0,)
        while len(process.service.seen) < 3:
            time.sleep(0.01)
        now.append(Process(type(process.loop)))
        process.end()
        now.reverse()
        third = calls.call("echo", 3)
        calls.call("release")
        assert calls.answer(second) == "second" and calls.answer(first) == "first"
        assert calls.answer(third) == (3,)
    assert now[0].service.seen == ["first", "second", (3,)]
    now[0].end()


def test_a_connection_that_breaks_is_made_anew(process):
    with wire(process.address) as calls:
        assert calls.answer(calls.call("echo", 1)) == (1,)
        calls._socket.shutdown(socket.SHUT_RDWR)
        assert calls.answer(calls.call("echo", 2)) == (2,)


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def cut_off(address: Address, sends: bytes) -> bool:
    """Whether the queue ends a connection on which this is sent, without an answer."""
    with socket.create_connection((address.host, address.port), SOON) as stranger:
        assert len(stranger.recv(frames.NONCE)) == frames.NONCE
        try:
            stranger.sendall(sends)
            return stranger.recv(1) == b""
        except ConnectionError:
            return True


@pytest.mark.parametrize("hello", [b"", bytes(64), b"GET / HTTP/1.1\r\n\r\n" * 10])
def test_who_has_no_key_is_cut_off_before_anything_is_unpickled(process, tmp_path, hello):
    bomb = Bomb(str(tmp_path / "made"))
    frame = b"".join(bytes(part) for part in frames.pack(1, ("echo", (bomb,))))
    assert cut_off(process.address(), hello + bytes(64) + frame)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "made").exists()


def test_the_queues_own_proof_does_not_let_a_caller_in(process):
    address = process.address()
    with socket.create_connection((address.host, address.port), SOON) as stranger:
        theirs = stranger.recv(frames.NONCE)
        wrong = frames.proof(address.key, b"queue", theirs + bytes(frames.NONCE))
        stranger.sendall(bytes(frames.NONCE) + wrong)
        assert stranger.recv(1) == b""


def test_who_says_nothing_is_cut_off(process, monkeypatch):
    monkeypatch.setattr(server, "HELLO_SECONDS", 0.2)
    assert cut_off(process.address(), b"half a word")


def test_a_caller_sends_nothing_to_who_is_not_the_queue(process, monkeypatch):
    address = process.address()._replace(key=bytes(32))
    sent: list[Any] = []
    monkeypatch.setattr(Wire, "_send", lambda self, number: sent.append(number))
    with wire(lambda: address) as calls, pytest.raises(TimeoutError, match="no connection"):
        calls.answer(calls.call("echo", 1), 0.2)
    assert not sent


def test_a_broken_network_is_no_limit_of_ours(process):
    """The kernel's own time limit is an error of the connection, which is made anew."""
    with wire(process.address) as calls:
        number = calls.call("echo", 1)
        receive, broken = calls._receive, [TimeoutError(errno.ETIMEDOUT, "keepalive")]

        def once(seconds: float | None) -> Any:
            if broken:
                raise broken.pop()
            return receive(seconds)

        calls._receive = once
        assert calls.answer(number) == (1,)


def test_what_failed_there_says_where(process):
    with wire(process.address) as calls, pytest.raises(TooManyFailures) as failed:
        calls.answer(calls.call("fail", TooManyFailures("30 of 40")))
    assert "in fail" in "".join(failed.value.__notes__)


@LOOPS
def test_with_rays_tls_both_sides_show_a_certificate_of_its_authority(tmp_path, monkeypatch, loop):
    loops = pytest.importorskip(loop)
    for name, value in authority(tmp_path / "ours").items():
        monkeypatch.setenv(name, value)
    process = Process(loops.new_event_loop)
    address = process.address()
    with wire(lambda: address) as calls:
        assert isinstance(calls.answer(calls.call("echo", 1)), tuple)
        assert isinstance(calls._socket, ssl.SSLSocket)
        large = np.arange(frames.JOINED)
        np.testing.assert_array_equal(calls.answer(calls.call("echo", large))[0], large)
    with socket.create_connection((address.host, address.port), SOON) as plain:
        plain.sendall(bytes(64))
        assert len(plain.recv(frames.NONCE)) != frames.NONCE
    for name, value in authority(tmp_path / "others").items():
        monkeypatch.setenv(name, value)
    with wire(lambda: address) as calls, pytest.raises(TimeoutError, match="certificate"):
        calls.answer(calls.call("echo", 1), 0.2)
    process.end()
