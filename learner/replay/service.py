"""The replay queue as a Ray actor.

The service adds to `ReplayQueue` what a process needs: waiting (never without a limit that names
what is missing), waking waiters, the clock of how long actors wait, and, in `learner.replay.cuts`,
the journal from which it comes back when its process died. Calls may come twice, then: each is
idempotent.
"""

import gc
import inspect
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.actor import Lease
from actors.rollout import Rollouts, Version
from configs import faults
from configs.schema import Config
from learner.replay import recovery
from learner.replay.clients import WEIGHTS, WITHHELD, plain
from learner.replay.cuts import Cuts
from learner.replay.ledger import describe_histogram
from learner.replay.records import Batch
from learner.replay.settings import Settings, of
from learner.replay.wire.frames import Address, join
from learner.replay.wire.server import Server

POLL_SECONDS = 5.0  # an actor's call for a lease comes back empty-handed after this long
GRACE_SECONDS = 30.0  # for whoever watches the run to stop it first
COLLECT = 20_000, 50, 10  # of Python's collector, which finds no cycles in what is held

Answer = Lease | str | Awaitable[Lease | str]  # a lease or a word, or where it has to be waited for


def start(config: Config, journal: Path | None, fault_folder: Path) -> Any:
    """Start the queue's actor; returns its Ray handle. Ray restarts it, and repeats the calls that
    were under way, up to `limits.queue_restarts` times."""
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000}
    if journal is not None:
        options |= {"max_restarts": config.limits.queue_restarts, "max_task_retries": -1}
    # Where the driver is: the journal is on its file system, and its node outlives no run.
    here = ray.get_runtime_context().get_node_id()
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
    settings = of(config, journal, fault_folder)
    return ray.remote(QueueService).options(**options).remote(settings)


class QueueService(Cuts):
    """Runs as an asyncio Ray actor: one thread, so every method acts on a consistent queue."""

    def __init__(self, settings: Settings) -> None:
        faults.install(*settings.faults)
        _without_tracing(self)
        gc.set_threshold(*COLLECT)
        super().__init__(settings)
        self.fleet: set[int] | None = None  # the actors that there are; None: whoever asks
        self.server = Server({
            "lease": self._leases(self.ask), "exchange": self._leases(self.exchange),
            "get": self.get, "commit": self.commit,
        })  # fmt: skip

    async def address(self) -> Address:
        """Where this process listens for actors' and ranks' connections."""
        return await self.server.address(ray.util.get_node_ip_address())

    @staticmethod
    def _leases(call: Callable[..., Answer]) -> Callable[..., Any]:
        """The call with its lease's weights left out, where the caller has them, or is to ask for
        them by `weights`. has: the version of the weights that the caller has."""

        def light(has: Version | None, found: Lease | str) -> Lease | str:
            if not isinstance(found, Lease) or found.weights is None:
                return found
            if plain(found.weights) and found.version != has:
                return found
            return Lease(found.id, found.groups, found.version, WITHHELD)

        async def later(has: Version | None, found: Awaitable[Lease | str]) -> Lease | str:
            return light(has, await found)

        def answer(has: Version | None, *arguments: Any) -> Answer:
            found = call(*arguments)
            if isinstance(found, Lease | str):
                return light(has, found)
            return later(has, found)

        return answer

    # Actors.

    async def lease(self, actor: int, slot: int = 0, done: int | None = None) -> Lease | str:
        """A lease; "wait" when none came up in POLL_SECONDS; "over" when the run is.

        slot: which of the leases that the actor serves at once this will be. done: the last one
        that this slot handed in.
        """
        found = self.ask(actor, slot, done)
        return found if isinstance(found, Lease | str) else await found

    def ask(self, actor: int, slot: int = 0, done: int | None = None) -> Answer:
        """`lease`, answered at once where it can be."""
        started = self.stalls.called(actor, slot)

        def look() -> Lease | str | None:
            return self._over(actor) or self.queue.lease(actor, slot, done)

        def answered(found: Lease | str | None) -> Lease | str:
            self.stalls.answered(actor, slot, started)
            if isinstance(found, Lease):
                self._note(recovery.leased(actor, slot, done))
            return found or "wait"

        async def later() -> Lease | str:
            return answered(await self._until(look, POLL_SECONDS))

        found = look()
        return answered(found) if found else later()

    async def weights(self, lease: int, version: Version) -> list[Any] | None:
        """What was published for a lease's version; None where the lease is not out under it."""
        taken = self.queue.line.leases.get(lease)
        if taken is None or taken.lease.version != version:
            return None
        found = taken.lease.weights  # in a queue that comes from its journal, not there
        return found if isinstance(found, list) else None

    async def newer(self, than: Version, probed: float | None = None) -> Lease | str:
        """Weights newer than these, see `ReplayQueue.newer`; "wait" and "over" as `lease` has."""
        self.queue.probed(probed)
        found = await self._until(lambda: self._over() or self.queue.newer(than), POLL_SECONDS)
        return found or "wait"

    def _over(self, actor: int | None = None) -> str | None:
        gone = actor is not None and self.fleet is not None and actor not in self.fleet
        return "over" if gone or self.closed or self.queue.finished else None

    async def put(self, lease: Lease, block: Rollouts, probed: float | None = None) -> None:
        """See `ReplayQueue.put`, and `ReplayQueue.probed`."""
        self.take(lease, block, probed)

    def take(self, lease: Lease, block: Rollouts, probed: float | None) -> None:
        """`put`, at once."""
        faults.hit("queue.put.before")
        self.queue.probed(probed)
        if (taken := self.queue.line.leases.get(lease.id)) is not None:
            self.stalls.heard(taken.actor)
        self.queue.put(lease, block)
        if self.journal:
            self._note(recovery.put(lease, block))
        faults.hit("queue.put.after")
        self._wake()

    def exchange(
        self, lease: Lease, block: Rollouts, probed: float | None, actor: int, slot: int
    ) -> Answer:  # fmt: skip
        """`put` of lease, block and probe, and then `lease` for this actor and slot: one call."""
        self.take(lease, block, probed)
        return self.ask(actor, slot, lease.id)

    async def release(self, actor: int | None, blame: bool = True) -> tuple[int, list[int]]:
        """See `Line.release`."""
        released = self.queue.release(actor, blame)
        self._note(recovery.released(actor, blame))
        if actor is not None:
            self.stalls.forget(actor)
        self._wake()
        return released

    async def expect(self, actors: list[int]) -> int:
        """The fleet is these actors from now on. Others get no lease, also where they wait for one;
        what they hold is issued again. Returns how many leases that is."""
        self.fleet = set(actors)
        held = {taken.actor for taken in self.queue.line.leases.values()}
        gone = sorted((held | set(self.stalls.quiet())) - self.fleet)
        for actor in gone:
            self.stalls.dismiss(actor)
        return sum([(await self.release(actor, blame=False))[0] for actor in gone])

    # Learner ranks.

    async def publish(self, version: Version, weights: list[Any]) -> None:
        """weights: a list, so that Ray does not fetch it here, of weights or their reference, and
        probe."""
        self._publish(version, weights)
        self._wants_weights = False
        self._wake()

    def _publish(self, version: Version, weights: list[Any]) -> None:
        self.queue.publish(version, weights)
        self._note(recovery.published(version))

    async def get(self, lineage: int, number: int, rank: int) -> Batch | str | None:
        """The rank's slice; None when the run was closed. TimeoutError names what is missing."""

        def ready() -> Batch | bool | str | None:
            self.queue.check_failures()
            if self._wants_weights and rank == 0:
                return WEIGHTS
            was_open, expired = self.queue.is_open(number), self._expired()
            if self.closed and not was_open:
                return True
            batch = self.queue.get(lineage, number, rank, join)
            if (batch is not None and not was_open) or self._expired() != expired:
                self._note(recovery.frozen(number))
            return batch

        with self.stalls.asking(number):
            while (batch := await self._until(ready, POLL_SECONDS)) is None:
                limit = self._stall_seconds + GRACE_SECONDS
                if number == self.queue.committed and self.stalls.silent() > limit:
                    missing = self.queue.missing(number)
                    raise TimeoutError(f"no rollout for {limit:.0f} s: {missing}")
        if isinstance(batch, Batch):
            batch.measures["actor_idle_fraction"] = self.stalls.idle_fraction()
            return batch
        return None if batch is True else batch

    def _expired(self) -> int:
        return self.queue.ledger.retired["expired"]

    async def commit(
        self, lineage: int, number: int, rank: int, stepped: bool,
        derived: dict[str, np.ndarray], weights: list[Any] | None, cut: str = "",
    ) -> None:  # fmt: skip
        """Report on a batch; with the last report, publish the version that it made.

        cut: folder of the checkpoint that ends with this batch.
        """
        faults.hit("queue.commit.before")
        if plain(weights):  # which came in one frame with what groups keep
            derived = {name: column.copy() for name, column in derived.items()}
        new = number >= self.queue.committed  # else it was said before the queue restarted
        self.queue.commit(lineage, number, rank, stepped, derived)
        if weights is not None:
            self._due[number] = weights
        if new:
            self._note(recovery.committed(lineage, number, rank, stepped, derived))
            self.stalls.committed()
        if new and cut:
            self._cuts[number] = cut
        self._publish_due()
        for done in [n for n in self._cuts if n < self.queue.committed]:
            self._cut(self._cuts.pop(done))
        faults.hit("queue.commit.after")
        self._wake()

    def _publish_due(self) -> None:
        last = self.queue.committed - 1
        if (weights := self._due.get(last)) is not None:
            self._publish(self.queue.version, weights)
        self._due = {number: weights for number, weights in self._due.items() if number > last}

    # The run.

    async def close(self) -> None:
        """End the run: actors are told so, and waiting ranks get None."""
        self.closed = True
        self._wake()

    async def report(self) -> dict[str, Any]:
        """Ledger, histograms of age and reuse, version, batches committed, actor idle fraction."""
        ledger = self.queue.ledger
        return {
            "ledger": ledger.counts(),
            "age": describe_histogram(ledger.age),
            "reuse": describe_histogram(ledger.reuse),
            "version": self.queue.version,
            "committed": self.queue.committed,
            "actor_idle_fraction": self.stalls.idle_fraction(),
            "last_failure": self.queue.line.last_failure,
        }

    async def status(self) -> dict[str, Any]:
        """What the watchdog looks at: seconds without any progress; without a word of the learner;
        and, by actor, since it took its oldest lease, or has neither had nor asked for one."""
        now, leases = time.monotonic(), self.queue.line.leases.values()
        held = {t.actor: now - t.since for t in sorted(leases, key=lambda t: -t.since)}
        return {
            "silent": self.stalls.silent(),
            "in_hand": 0.0 if self._over() else self.stalls.in_hand(self.queue.committed),
            "actors": {} if self._over() else {**self.stalls.quiet(), **held},
            "journal_bytes": self.journal.bytes if self.journal else 0,
            "journal_broken": self.journal.broken if self.journal else "",
            "missing": self.queue.missing(self.queue.committed),
        }


def _without_tracing(actor: object) -> None:
    """Within an actor's process its methods call each other without Ray's wrapper for tracing,
    which every method has, and a put goes through a dozen of."""
    for name, method in inspect.getmembers(actor, inspect.ismethod):
        setattr(actor, name, MethodType(inspect.unwrap(method.__func__), actor))
