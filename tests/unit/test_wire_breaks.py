"""Calls to the queue when nobody answers: what a break costs, what is asked again, when it ends."""

import errno
import socket
import time
from typing import Any

import pytest

from learner.replay.wire.frames import Address
from tests import wire_process
from tests.wire_process import Process, wire

connections, process = wire_process.connections, wire_process.process


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
