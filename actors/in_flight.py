"""An actor whose weights change in mid-generation: several leases at once over one engine.

Slots serve a lease each, in a thread of their own, and the engine batches what all of them ask for.
A watcher gives the engine every newer version as soon as it is published, while requests run. So a
lease's version is a lower bound, and the truth is in each token's.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol

from actors.actor import Lease, Prompts, QueueClient, RewardClient, RolloutActor, load
from actors.engine import Request, RolloutEngine
from actors.rollout import Version


class WatchedQueue(QueueClient, Protocol):
    """The replay queue, as an in-flight actor sees it."""

    def newer(self, than: Version) -> Lease | None:
        """The newest weights that actors may have, once newer than these, as a lease of no
        prompts; None when the run is over."""


class InFlightActor:
    """Serves leases until the queue has no more. The engine must load while it generates."""

    def __init__(
        self, index: int, engine: RolloutEngine, prompts: Prompts, queues: Sequence[WatchedQueue],
        rewards: RewardClient, reward_seconds: float,
    ) -> None:  # fmt: skip
        """queues: one client for each slot, and one more for the watcher."""
        self.engine = engine
        *slots, self.watched = queues
        self.slots = [
            _Slot(self, index, engine, prompts, queue, rewards, reward_seconds) for queue in slots
        ]
        self.lock, self.reading = threading.Lock(), threading.Lock()

    def run(self) -> dict[str, float]:
        """Serve until the run is over; returns the seconds spent on each part, of all slots.

        What fails in any thread is raised at once; the others are left to the process's end.
        """
        jobs = [*(slot.run for slot in self.slots), self._watch]
        threads = ThreadPoolExecutor(len(jobs), thread_name_prefix="in-flight")
        calls = [threads.submit(job) for job in jobs]
        done, _ = wait(calls, return_when=FIRST_EXCEPTION)
        threads.shutdown(wait=False, cancel_futures=True)
        for call in done:
            call.result()
        seconds: Counter[str] = Counter()
        for slot in self.slots:
            seconds.update(slot.seconds)
        return dict(seconds)

    def take(self, lease: Lease, queue: QueueClient) -> None:
        """Load the lease's weights where they are newer than the engine's; one load at a time, so
        that its probe sees no other's weights."""
        if lease.weights is None or lease.version <= self.engine.version:
            return  # without waiting for a probe that is under way
        with self.lock:
            if lease.version > self.engine.version:
                load(self.engine, lease, queue)

    def _watch(self) -> None:
        """Load what is published, for at most half of the time: a paused engine makes no token."""
        while (lease := self.watched.newer(self.engine.version)) is not None:
            started = time.monotonic()
            self.take(lease, self.watched)
            time.sleep(time.monotonic() - started)


class _Slot(RolloutActor):
    """One lease at a time, on the shared engine."""

    def __init__(
        self, shared: InFlightActor, index: int, engine: RolloutEngine, prompts: Prompts,
        queue: QueueClient, rewards: RewardClient, reward_seconds: float,
    ) -> None:  # fmt: skip
        super().__init__(index, engine, prompts, queue, rewards, reward_seconds)
        self.shared = shared

    def _take_weights(self, lease: Lease) -> None:
        self.shared.take(lease, self.queue)

    def _requests(self, lease: Lease) -> list[Request]:
        with self.shared.reading:  # a prompt stream is for one thread at a time
            return super()._requests(lease)
