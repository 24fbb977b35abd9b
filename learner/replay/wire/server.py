"""The queue's end of its connections."""

import asyncio
import hmac
import inspect
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from learner.replay.wire import frames
from learner.replay.wire.frames import HEAD, NONCE, PROOF, Address

HELLO_SECONDS = 10.0  # for a caller to show that it has the key
MOST = 1.1  # times a frame's size that its buffer may have

Frame = list[Any]  # buffers, to be sent together
Calls = Mapping[str, Callable[..., Any]]  # what it returns is the answer, or an awaitable of it


class Server:
    """Answers calls by name: what needs no wait as its frame arrives, others each as a task of its
    own, begun in the order of frames."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.key = secrets.token_bytes(32)
        self.tasks: set[asyncio.Task[None]] = set()  # which asyncio itself holds weakly
        self._listening: asyncio.Task[Address] | None = None

    async def address(self, host: str) -> Address:
        """Where it listens from the first call on: at a free port of this host, and on Linux under
        a name for callers of this machine."""
        if self._listening is None or (self._listening.done() and self._listening.exception()):
            self._listening = asyncio.ensure_future(self._listen(host))
        return await self._listening

    async def _listen(self, host: str) -> Address:
        loop, context = asyncio.get_running_loop(), frames.tls(listens=True)
        limit = HELLO_SECONDS if context else None
        self.server = await loop.create_server(
            lambda: _Connection(self), host, 0, ssl=context, ssl_handshake_timeout=limit
        )
        port: int = self.server.sockets[0].getsockname()[1]
        local = "" if context or sys.platform != "linux" else f"\0onpolicy-{secrets.token_hex(16)}"
        try:
            if local:
                self.local = await loop.create_unix_server(lambda: _Connection(self), local)
        except OSError:  # where a sandbox has none
            local = ""
        return Address(host, port, local, self.key)

    def answer(self, number: int, count: int, body: memoryview) -> Frame | Awaitable[Frame]:
        """The frame that answers a call, or where it has to wait, what makes it."""
        try:
            name, arguments = frames.unpack(count, body)
            found = self.calls[name](*arguments)
            if inspect.isawaitable(found):
                return self._later(number, found)
            return _good(number, found)
        except Exception as error:
            return _bad(number, error)

    async def _later(self, number: int, found: Awaitable[Any]) -> Frame:
        try:
            return _good(number, await found)
        except Exception as error:
            return _bad(number, error)


def _good(number: int, value: Any) -> Frame:
    """The answer to a call that succeeded."""
    return frames.pack(number, (True, value))


def _bad(number: int, error: Exception) -> Frame:
    return frames.pack(number, (False, frames.portable(error)))


class _Connection(asyncio.BufferedProtocol):
    """One caller: nonce, its proof, ours, and then frames.

    A frame is read into a buffer of the last one's size, where one of its kind fits at one go.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.nonce = os.urandom(NONCE)
        self.buffer, self.filled = np.empty(NONCE + PROOF, np.uint8).data, 0
        self.wanted, self.then = NONCE + PROOF, self.greeted  # so many bytes, and what comes then

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        frames.set_options(transport.get_extra_info("socket"))
        transport.write(self.nonce)
        loop = asyncio.get_running_loop()
        self.deadline = loop.call_later(HELLO_SECONDS, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self.deadline.cancel()
        self.buffer, self.then = memoryview(b""), self.transport.abort  # no cycle keeps the last

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer[self.filled :]

    def buffer_updated(self, count: int) -> None:
        self.filled += count
        while self.filled >= self.wanted:
            self.then()

    def greeted(self) -> None:
        nonces, shown = self.nonce + bytes(self.buffer[:NONCE]), self.buffer[NONCE:]
        self.expect(HEAD.size, self.buffer[:0])
        if not hmac.compare_digest(frames.proof(self.server.key, b"caller", nonces), shown):
            self.transport.abort()
            return
        self.deadline.cancel()
        self.transport.write(frames.proof(self.server.key, b"queue", nonces))

    def expect(self, size: int, received: memoryview) -> None:
        """A frame of about this size comes next, whose first bytes have been received."""
        self.buffer = np.empty(max(size, len(received)), np.uint8).data
        self.buffer[: len(received)] = received
        self.filled, self.wanted, self.then = len(received), HEAD.size, self.begun

    def begun(self) -> None:
        self.number, size, self.count = HEAD.unpack_from(self.buffer)
        self.wanted, self.then = HEAD.size + size, self.ended
        if self.wanted > len(self.buffer):
            smaller, self.buffer = self.buffer, np.empty(self.wanted, np.uint8).data
            self.buffer[: self.filled] = smaller[: self.filled]

    def ended(self) -> None:
        body, more = self.buffer[HEAD.size : self.wanted], self.buffer[self.wanted : self.filled]
        if len(self.buffer) > MOST * self.wanted:  # what is kept of it would keep all
            body = np.array(body).data
        number, count = self.number, self.count
        self.expect(self.wanted, more)
        found = self.server.answer(number, count, body)
        if isinstance(found, list):
            self.send(found)
            return
        task = asyncio.ensure_future(self.later(found))
        self.server.tasks.add(task)
        task.add_done_callback(self.server.tasks.discard)

    async def later(self, found: Awaitable[Frame]) -> None:
        self.send(await found)

    def send(self, frame: Frame) -> None:
        if not self.transport.is_closing():
            self.transport.writelines(frame)
