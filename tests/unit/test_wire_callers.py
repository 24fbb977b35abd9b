"""Who may call the queue: nothing is unpickled before both sides have shown that they may."""

import os
import pickle
import socket
import ssl
from typing import Any

import numpy as np
import pytest

from learner.replay.wire import frames, server
from learner.replay.wire.client import Wire
from learner.replay.wire.frames import Address
from tests import wire_process
from tests.certificates import authority
from tests.wire_process import SOON, Process, wire

connections, process = wire_process.connections, wire_process.process
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


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
