"""Weights pushed to a group of actors, where nobody who dies, joins or stalls is waited for.

The threads and time limits around `learner.membership`. What communicates is behind two small
Protocols: `Transport` finds out who is there and builds a `Link` per epoch, which sends. Each of
its calls runs in a thread of its own and has `seconds`; after that the link is abandoned, the epoch
is over, and the actors that missed the version take it by host. So the learner's ranks, who gather
parameters together, never stand still for an actor.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.rollout import Version
from learner.membership import Member, Membership, Plan

ABANDON_SECONDS = 10.0  # for ending a communicator, which may itself get stuck

log = logging.getLogger(__name__)


class Abandoned(RuntimeError):
    """Raised in a link's thread, when what it sends is not wanted any more."""


class Link(Protocol):
    """The communicator of one epoch."""

    def send(self, version: Version, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Give all members the version; raises where one does not get it. weights: in the order of
        `DeepSpeedEngine.gathered`, each tensor the receiver's to keep."""

    def abandon(self) -> None:
        """End it, from any thread, also in the middle of a send; twice does no harm."""


class Transport(Protocol):
    """Builds links. actors: by index, what `TransferGroup.join` was given."""

    def present(self, actors: Mapping[int, Any]) -> set[int]:
        """Those that answer, within a short time of its own."""

    def connect(self, epoch: int, actors: Mapping[int, Any]) -> Link:
        """Meet all of these; raises where one is missing."""


class TransferGroup:
    """The group. `join` and `leave` from any thread; `begin` and what it returns from one."""

    def __init__(self, transport: Transport, seconds: float) -> None:
        self.transport = transport
        self.seconds = seconds
        self.state = Membership()
        self.failures = 0  # rebuilds and sends that came to nothing
        self._actors: dict[int, Any] = {}
        self._link: Link | None = None
        self._lock = threading.Lock()

    def join(self, actor: int, handle: Any) -> None:
        """An actor's process, new or restarted; it is in from the next version on."""
        with self._lock:
            self.state = self.state.joined(actor)
            self._actors[actor] = handle

    def leave(self, actor: int) -> None:
        with self._lock:
            self.state = self.state.left(actor)
            self._actors.pop(actor, None)

    def begin(self, version: Version) -> "Sending | None":
        """Start to send a version to whoever is there; None where nobody is or can be reached."""
        with self._lock:
            state, actors = self.state, dict(self._actors)
        here = self._within("looking for actors", lambda: self.transport.present(actors)) or set()
        present = frozenset(m for m in state.alive if m.actor in here)
        plan = state.next(present)
        if plan is not Plan.KEEP:
            self._end_link()
        if plan is Plan.REBUILD:
            self._rebuild(present, actors)
        if self._link is None:
            return None
        return Sending(self, self._link, version)

    def _rebuild(self, present: frozenset[Member], actors: dict[int, Any]) -> None:
        with self._lock:
            self.state = self.state.rebuilding(present)
            epoch, members = self.state.epoch, sorted(self.state.linked)
        wanted = {m.actor: actors[m.actor] for m in members}
        what = f"building epoch {epoch} of the transfer group with actors {sorted(wanted)}"
        late = threading.Event()

        def connect() -> Link:
            link = self.transport.connect(epoch, wanted)
            if late.is_set():
                link.abandon()
            return link

        self._link = self._within(what, connect, late)
        if self._link is None:
            self.broken()

    def broken(self) -> None:
        """The epoch is over: abandon its link; the next version goes to a new one."""
        self.failures += 1
        self._end_link()

    def _end_link(self) -> None:
        with self._lock:
            self.state = self.state.broken()
        link, self._link = self._link, None
        if link is not None:
            thread = threading.Thread(target=link.abandon, name="abandon", daemon=True)
            thread.start()
            thread.join(ABANDON_SECONDS)

    def _within(self, what: str, call: Callable[[], Any], late: Any = None) -> Any:
        """What the call returns; None, and a line in the log, where it fails or takes too long."""
        answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

        def work() -> None:
            try:
                answer.put((call(), None))
            except BaseException as error:
                answer.put((None, error))

        threading.Thread(target=work, name="transfer", daemon=True).start()
        try:
            value, error = answer.get(timeout=self.seconds)
        except queue.Empty:
            if late is not None:
                late.set()
            value, error = None, TimeoutError(f"no answer in {self.seconds:.0f} s")
        if error is not None:
            log.warning("%s failed, weights go by host: %s", what, error)
        return value


class Sending:
    """One version on its way. `feed` it every parameter in order, then `end` it."""

    def __init__(self, group: TransferGroup, link: Link, version: Version) -> None:
        self.group, self.link, self.version = group, link, version
        self.deadline = time.monotonic() + group.seconds
        self.failure: BaseException | None = None
        self._parts: queue.Queue[tuple[str, Tensor] | None] = queue.Queue(1)
        self._done = threading.Event()
        self._ended = False  # the sender has seen the last parameter
        threading.Thread(target=self._send, name="send", daemon=True).start()

    def _send(self) -> None:
        try:
            self.link.send(self.version, self._weights())
            if not self._ended:
                raise RuntimeError("the link did not take all parameters")
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self._done.set()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        while (part := self._parts.get()) is not None:
            yield part
        if self.failure is not None:
            raise Abandoned(str(self.failure))
        self._ended = True

    def feed(self, name: str, tensor: Tensor) -> None:
        """Hand on a parameter, as a copy. After a failure the rest is taken and dropped, since the
        other ranks gather it with this one."""
        if self.failure is not None:
            return
        if tensor.is_cuda:  # the copy is read in another thread, on streams of its own
            tensor = tensor.clone()
            torch.cuda.current_stream().synchronize()
        else:
            tensor = tensor.clone()
        self._put((name, tensor))

    def _put(self, part: tuple[str, Tensor] | None) -> None:
        while self.failure is None and not self._done.is_set():
            left = self.deadline - time.monotonic()
            if left <= 0:
                self.failure = TimeoutError(f"not sent in {self.group.seconds:.0f} s")
                return
            try:
                self._parts.put(part, timeout=min(left, 0.1))
                return
            except queue.Full:
                continue

    def end(self) -> bool:
        """Whether every member has the version; if not, the epoch is over."""
        self._put(None)
        if self.failure is None and not self._done.wait(self.deadline - time.monotonic()):
            self.failure = TimeoutError(f"not taken in {self.group.seconds:.0f} s")
        if self.failure is None:
            return True
        log.warning("version %s was not pushed to all, it goes by host: %s",
                    self.version.step, self.failure)  # fmt: skip
        self._drain()
        self.group.broken()
        return False

    def _drain(self) -> None:
        """Let a sender that still reads see the end, and raise."""
        while True:
            try:
                self._parts.get_nowait()
            except queue.Empty:
                break
        self._parts.put(None)
