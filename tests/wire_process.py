"""A queue's process for tests, in a thread of this one, and a connection to it.

A test file takes the fixtures as its own: `process = wire_process.process`.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from learner.replay.wire import client, server
from learner.replay.wire.client import Wire
from learner.replay.wire.frames import Address
from learner.replay.wire.server import Server

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


@contextmanager
def wire(find: Callable[[], Address]) -> Iterator[Wire]:
    made = Wire(find)
    yield made
    made.close()
