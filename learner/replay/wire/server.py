"""The queue's end of its connections."""

import asyncio
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from learner.replay.wire import frames
from learner.replay.wire.frames import HEAD, NONCE, PROOF, Address

HELLO_SECONDS = 10.0  # for a caller to show that it has the key

Calls = Mapping[str, Callable[..., Awaitable[Any]]]


class Server:
    """Answers calls by name, each frame as a task of its own, begun in the order of frames."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.key = secrets.token_bytes(32)
        self.tasks: set[asyncio.Task[None]] = set()  # which asyncio itself holds weakly
        self._listening: asyncio.Task[Address] | None = None

    async def address(self, host: str) -> Address:
        """Where it listens: at a free port of this host, from the first call on."""
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
        return Address(host, port, self.key)

    async def answer(self, number: int, count: int, body: memoryview) -> list[Any]:
        """The frame that answers a call: whether it succeeded, and the value or error."""
        try:
            name, arguments = frames.unpack(count, body)
            return frames.pack(number, (True, await self.calls[name](*arguments)))
        except Exception as error:
            return frames.pack(number, (False, frames.portable(error)))


class _Connection(asyncio.BufferedProtocol):
    """One caller: nonce, its proof, ours, and then frames."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.nonce = os.urandom(NONCE)
        self.expect(NONCE + PROOF, self.greeted)

    def expect(self, size: int, then: Callable[[memoryview], None]) -> None:
        """Read so many bytes next, and go on with them."""
        self.buffer, self.filled, self.then = np.empty(size, np.uint8).data, 0, then

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        frames.keep_alive(transport.get_extra_info("socket"))
        transport.write(self.nonce)
        loop = asyncio.get_running_loop()
        self.deadline = loop.call_later(HELLO_SECONDS, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self.deadline.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer[self.filled :]

    def buffer_updated(self, count: int) -> None:
        self.filled += count
        if self.filled == len(self.buffer):
            self.then(self.buffer)

    def greeted(self, hello: memoryview) -> None:
        nonces = self.nonce + bytes(hello[:NONCE])
        if not hmac.compare_digest(frames.proof(self.server.key, b"caller", nonces), hello[NONCE:]):
            self.then = lambda _: None
            self.transport.abort()
            return
        self.deadline.cancel()
        self.transport.write(frames.proof(self.server.key, b"queue", nonces))
        self.expect(HEAD.size, self.begun)

    def begun(self, head: memoryview) -> None:
        self.number, size, self.count = HEAD.unpack(head)
        self.expect(size, self.ended)

    def ended(self, body: memoryview) -> None:
        task = asyncio.ensure_future(self.answer(self.number, self.count, body))
        self.expect(HEAD.size, self.begun)
        self.server.tasks.add(task)
        task.add_done_callback(self.server.tasks.discard)

    async def answer(self, number: int, count: int, body: memoryview) -> None:
        frame = await self.server.answer(number, count, body)
        if not self.transport.is_closing():
            self.transport.writelines(frame)
