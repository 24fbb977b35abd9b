"""A caller's end of a connection to the queue."""

import hmac
import io
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from learner.replay.wire import frames
from learner.replay.wire.frames import HEAD, NONCE, PROOF, Address

CONNECT_SECONDS = 10.0
AGAIN_SECONDS = 0.1  # between attempts to connect
AT_ONCE = 1000  # buffers that the kernel takes at most, or a few more
SEND_SECONDS = 120.0  # for the queue to take what is sent


class Wire:
    """Calls to the queue over a connection of its own, for one thread.

    find: where the queue listens now; raises where it is gone for good. A connection that breaks is
    made anew, and what was not answered is asked again: the queue's calls may come twice.
    """

    def __init__(self, find: Callable[[], Address]) -> None:
        self.find = find
        self._socket: socket.socket | None = None
        self._reader: io.BufferedIOBase | None = None  # of the socket
        self._asked: dict[int, tuple[str, tuple[Any, ...]]] = {}  # by number: not yet answered
        self._answers: dict[int, tuple[bool, Any]] = {}  # and not yet fetched
        self._number = 0

    def call(self, name: str, *arguments: Any) -> int:
        """Begin a call; returns the number by which its answer is fetched."""
        self._number += 1
        self._asked[self._number] = name, arguments
        try:
            if self._socket is not None:
                self._send(self._number)
        except OSError:
            self.close()
        return self._number

    def answer(self, number: int, seconds: float | None = None) -> Any:
        """The answer to a call, waited for; what it raised there is raised here.

        seconds: TimeoutError after so long without a word; None: as long as the queue lives.
        """
        while number not in self._answers:
            if self._socket is None:
                self._connect(seconds)
            try:
                answered, count, body = self._receive(seconds)
            except (OSError, EOFError) as error:
                self.close()  # it may have come to the middle of a frame
                if isinstance(error, TimeoutError) and error.errno is None:  # none of the network's
                    raise TimeoutError(f"no answer of the replay queue for {seconds} s") from None
                time.sleep(AGAIN_SECONDS)
                continue
            if self._asked.pop(answered, None) is not None:
                self._answers[answered] = frames.unpack(count, body)
        succeeded, value = self._answers.pop(number)
        if succeeded:
            return value
        raise value

    def forget(self, number: int) -> None:
        """The answer to a call is not wanted any more."""
        self._asked.pop(number, None)
        self._answers.pop(number, None)

    def close(self) -> None:
        """End the connection; the next call makes another."""
        if self._socket is not None and self._reader is not None:
            self._reader.close()
            self._socket.close()
        self._socket = self._reader = None

    def _receive(self, seconds: float | None) -> tuple[int, int, memoryview]:
        """The next frame: number of its call, how many buffers, and these."""
        assert self._socket is not None and self._reader is not None
        self._socket.settimeout(seconds)
        number, size, count = HEAD.unpack(_exactly(self._reader, HEAD.size))
        return number, count, _exactly(self._reader, size)

    def _connect(self, seconds: float | None) -> None:
        """Connect, and ask again what is not answered. seconds: as `answer` has it."""
        began = time.monotonic()
        while True:
            try:
                self._socket, self._reader = _connected(self.find())
                for number in list(self._asked):
                    self._send(number)
                return
            except (OSError, EOFError) as error:
                self.close()
                if seconds is not None and time.monotonic() - began > seconds:
                    raise TimeoutError(
                        f"no connection to the replay queue for {seconds} s: {error}"
                    ) from error
                time.sleep(AGAIN_SECONDS)

    def _send(self, number: int) -> None:
        assert self._socket is not None
        self._socket.settimeout(SEND_SECONDS)
        _send_all(self._socket, frames.pack(number, self._asked[number]))


def _connected(address: Address) -> tuple[socket.socket, io.BufferedIOBase]:
    """A connection, with its reader, whose other side has shown that it has the key."""
    made = _local(address.local) or _remote(address)
    reader = made.makefile("rb")
    try:
        theirs, ours = bytes(_exactly(reader, NONCE)), os.urandom(NONCE)
        made.sendall(ours + frames.proof(address.key, b"caller", theirs + ours))
        shown = frames.proof(address.key, b"queue", theirs + ours)
        if not hmac.compare_digest(shown, _exactly(reader, PROOF)):
            raise ConnectionError("what answers is not the queue")
    except BaseException:
        reader.close()
        made.close()
        raise
    return made, reader


def _local(name: str) -> socket.socket | None:
    """A connection within this machine; None where the queue is not on it."""
    if not name:
        return None
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(CONNECT_SECONDS)
        frames.set_options(made)
        made.connect(name)
    except OSError:
        made.close()
        return None
    return made


def _remote(address: Address) -> socket.socket:
    plain = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frames.set_options(plain)
        context = frames.tls(listens=False)
        return context.wrap_socket(plain) if context else plain
    except BaseException:
        plain.close()
        raise


def _send_all(target: socket.socket, parts: list[Any]) -> None:
    """All parts, in one call where the kernel takes them at once."""
    sent = 0 if isinstance(target, ssl.SSLSocket) else target.sendmsg(parts[:AT_ONCE])
    for part in parts:
        if sent < len(part):
            target.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


def _exactly(source: io.BufferedIOBase, size: int) -> memoryview:
    """So many bytes; EOFError where the other side ended."""
    buffer = np.empty(size, np.uint8).data
    if source.readinto(buffer) < size:
        raise EOFError("the connection ended")
    return buffer
