"""The replay queue as a Ray actor, and the clients through which others see it.

The service adds to `ReplayQueue` what a process needs: waiting (never without a limit that names
what is missing), waking waiters, and the clock of how long actors wait.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from actors.actor import Lease
from actors.rollout import Rollouts, Version
from learner.replay.ledger import describe_histogram
from learner.replay.queue import ReplayQueue
from learner.replay.records import Batch
from learner.replay.staleness import Plan

POLL_SECONDS = 5.0  # an actor's call for a lease comes back empty-handed after this long


class QueueService:
    """Runs as an asyncio Ray actor: one thread, so every method acts on a consistent queue."""

    def __init__(
        self, plan: Plan, ranks: int, min_valid: int, failure_rate: float, failure_window: int,
        wait_seconds: float,
    ) -> None:  # fmt: skip
        self.queue = ReplayQueue(plan, ranks, min_valid, failure_rate, failure_window)
        self.wait_seconds = wait_seconds
        self.closed = False
        self._due: list[Any] | None = None  # rank 0's weights of a batch not yet committed by all
        self._committed = 0.0  # time.monotonic() of the last commit
        self._waiters: set[asyncio.Event] = set()
        # (actor, slot) → [first call, seconds waited]
        self._actor_clock: dict[tuple[int, int], list[float]] = {}

    async def lease(self, actor: int, slot: int = 0) -> Lease | str:
        """A lease; "wait" when none came up in POLL_SECONDS; "over" when the run is.

        slot: which of the leases that the actor serves at once this will be.
        """
        started = time.monotonic()
        clock = self._actor_clock.setdefault((actor, slot), [started, 0.0])
        lease = await self._until(lambda: self._over() or self.queue.lease(actor), POLL_SECONDS)
        clock[1] += time.monotonic() - started
        return lease or "wait"

    async def newer(self, than: Version) -> Lease | str:
        """Weights newer than these, see `ReplayQueue.newer`; "wait" and "over" as `lease` has."""
        found = await self._until(lambda: self._over() or self.queue.newer(than), POLL_SECONDS)
        return found or "wait"

    def _over(self) -> str | None:
        return "over" if self.closed or self.queue.finished else None

    async def put(self, lease: Lease, block: Rollouts) -> None:
        self.queue.put(lease, block)
        self._wake()

    async def release(self, actor: int) -> int:
        released = self.queue.release(actor)
        self._wake()
        return released

    async def publish(self, version: Version, weights: list[Any]) -> None:
        """weights: a list with the object reference, so that Ray does not fetch it here."""
        self.queue.publish(version, weights)
        self._wake()

    async def get(self, lineage: int, number: int, rank: int) -> Batch | None:
        """The rank's slice; None when the run was closed. TimeoutError names what is missing."""

        def ready() -> Batch | bool | None:
            self.queue.check_failures()
            return self.closed or self.queue.get(lineage, number, rank)

        while (batch := await self._until(ready, self.wait_seconds)) is None:
            since_commit = time.monotonic() - self._committed
            if number > self.queue.committed or since_commit < self.wait_seconds:
                continue  # fetched ahead: it was the learner that took its time
            missing = self.queue.missing(number)
            raise TimeoutError(f"no batch for {self.wait_seconds:.0f} s: {missing}")
        if isinstance(batch, Batch):
            batch.measures["actor_idle_fraction"] = self._actor_idle()
            return batch
        return None

    async def commit(
        self, lineage: int, number: int, rank: int, stepped: bool,
        derived: dict[str, np.ndarray], weights: list[Any] | None,
    ) -> None:  # fmt: skip
        """Report on a batch; with the last report, publish the version that it made."""
        self._committed = time.monotonic()
        self._due = weights or self._due
        if self.queue.commit(lineage, number, rank, stepped, derived) and self._due is not None:
            self.queue.publish(self.queue.version, self._due)
            self._due = None
        self._wake()

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
            "actor_idle_fraction": self._actor_idle(),
            "last_failure": self.queue.line.last_failure,
        }

    def _actor_idle(self) -> float | None:
        now = time.monotonic()
        total = sum(now - first for first, _ in self._actor_clock.values())
        waited = sum(seconds for _, seconds in self._actor_clock.values())
        return min(1.0, waited / total) if total else None

    def _wake(self) -> None:
        for event in self._waiters:
            event.set()

    async def _until(self, condition: Callable[[], Any], seconds: float) -> Any:
        """The condition's first true value, looked at after every change; None after `seconds`."""
        deadline = time.monotonic() + seconds
        event = asyncio.Event()
        self._waiters.add(event)
        try:
            while not (value := condition()):
                event.clear()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                try:
                    await asyncio.wait_for(event.wait(), remaining)
                except TimeoutError:
                    return None
            return value
        finally:
            self._waiters.discard(event)


def start(
    plan: Plan, ranks: int, min_valid: int, failure_rate: float, failure_window: int,
    wait_seconds: float,
) -> Any:  # fmt: skip
    """Start the queue's actor; returns its Ray handle."""
    remote = ray.remote(QueueService).options(num_cpus=0, max_concurrency=1000)
    return remote.remote(plan, ranks, min_valid, failure_rate, failure_window, wait_seconds)


class ActorQueue:
    """`actors.actor.QueueClient` over the Ray actor."""

    def __init__(self, handle: Any, wait_seconds: float, slot: int = 0) -> None:
        self.handle = handle
        self.wait_seconds = wait_seconds
        self.slot = slot
        self._put: list[Any] = []  # the last put, whose failure the next call raises

    def lease(self, actor: int) -> Lease | None:
        while True:
            calls = [self.handle.lease.remote(actor, self.slot), *self._put]
            answer = ray.get(calls, timeout=self.wait_seconds)[0]
            if answer != "wait":
                return None if answer == "over" else answer

    def newer(self, than: Version) -> Lease | None:
        """The newest weights that actors may have, once newer than these; None at the end."""
        while True:
            answer = ray.get(self.handle.newer.remote(than), timeout=self.wait_seconds)
            if answer != "wait":
                return None if answer == "over" else answer

    def weights(self, lease: Lease) -> np.ndarray:
        return ray.get(lease.weights[0], timeout=self.wait_seconds)

    def put(self, lease: Lease, block: Rollouts) -> None:
        self._put = [self.handle.put.remote(lease, block)]


class LearnerQueue:
    """The queue as one learner rank sees it."""

    def __init__(self, handle: Any, rank: int, wait_seconds: float) -> None:
        self.handle = handle
        self.rank = rank
        self.wait_seconds = wait_seconds
        self._commits: list[Any] = []  # the last two, whose failure a later call raises
        self._ahead: dict[int, Any] = {}  # the batch after the one in hand, on its way

    def get(self, lineage: int, number: int) -> Batch | None:
        """Wait for the rank's slice; None when the run was closed."""
        call = self._ahead.pop(number, None)
        if call is None:
            call = self.handle.get.remote(lineage, number, self.rank)
        # The last commit is on its way and not waited for; the one before it is long there.
        batch = ray.get([call, *self._commits[:-1]], timeout=self.wait_seconds + 10.0)[0]
        if batch is not None and not batch.last:
            self._ahead = {number + 1: self.handle.get.remote(lineage, number + 1, self.rank)}
        return batch

    def commit(
        self, batch: Batch, stepped: bool, derived: dict[str, np.ndarray], weights: Any = None
    ) -> None:
        """Report a step or skip, without waiting for the answer."""
        call = self.handle.commit.remote(
            batch.lineage, batch.number, self.rank, stepped, derived,
            None if weights is None else [weights],
        )  # fmt: skip
        self._commits = [*self._commits[-1:], call]
        if not stepped:
            self._ahead = {}  # it was tagged as if this one had stepped

    def publish(self, version: Version, weights: Any) -> None:
        ray.get(self.handle.publish.remote(version, [weights]), timeout=self.wait_seconds)
