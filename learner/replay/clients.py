"""The queue's Ray actor as others see it: rollout actors, and learner ranks."""

from collections import deque
from typing import Any

import numpy as np
import ray

from actors.actor import Lease
from actors.low_rank import LowRank
from actors.rollout import Rollouts, Version
from learner.replay.records import Batch

WEIGHTS = "weights"  # a restarted queue's answer to rank 0: publish again what you last published


def received(weights: np.ndarray | LowRank, wait_seconds: float) -> np.ndarray:
    """Published weights as a flat array, merged with those they are relative to."""
    if isinstance(weights, LowRank):
        return weights.onto(ray.get(weights.base[0], timeout=wait_seconds))
    return weights


class ActorQueue:
    """`actors.actor.QueueClient` over the Ray actor."""

    def __init__(self, handle: Any, wait_seconds: float, slot: int = 0) -> None:
        self.handle = handle
        self.wait_seconds = wait_seconds
        self.slot = slot
        self._done = -1  # the last lease handed in
        self._probed: float | None = None  # for the next call to carry
        self._actor = -1
        self._put: Any = None  # its put, which answers with the next lease, or fails

    def lease(self, actor: int) -> Lease | None:
        self._actor = actor
        while True:
            call = self._put or self.handle.lease.remote(actor, self.slot, self._done)
            self._put = None
            answer = ray.get(call, timeout=self.wait_seconds)
            if answer != "wait":
                return None if answer == "over" else answer

    def newer(self, than: Version) -> Lease | None:
        """The newest weights that actors may have, once newer than these; None at the end."""
        while True:
            call = self.handle.newer.remote(than, self._carried())
            answer = ray.get(call, timeout=self.wait_seconds)
            if answer != "wait":
                return None if answer == "over" else answer

    def weights(self, lease: Lease) -> np.ndarray:
        found = ray.get(lease.weights[0], timeout=self.wait_seconds)
        return received(found, self.wait_seconds)

    def put(self, lease: Lease, block: Rollouts) -> None:
        self._done = lease.id
        answer = (lease, block, self._carried(), self._actor, self.slot)
        self._put = self.handle.exchange.remote(answer)

    def probed(self, nats: float) -> None:
        self._probed = nats

    def _carried(self) -> float | None:
        nats, self._probed = self._probed, None
        return nats


class LearnerQueue:
    """The queue as one learner rank sees it.

    published: takes what is published, [reference, probe], and has what a restarted queue may ask
    for again.
    """

    def __init__(
        self,
        handle: Any,
        rank: int,
        wait_seconds: float,
        published: deque[tuple[Version, list[Any]]],
    ) -> None:
        self.handle = handle
        self.rank = rank
        self.wait_seconds = wait_seconds
        self._published = published
        self._commit: Any = None  # the last one, on its way; the next one waits for it
        self._ahead: dict[int, Any] = {}  # the batch after the one in hand, on its way

    def get(self, lineage: int, number: int) -> Batch | None:
        """Wait for the rank's slice; None when the run was closed."""
        batch: Any = WEIGHTS
        while batch == WEIGHTS:
            call = self._ahead.pop(number, None)
            if call is None:
                call = self.handle.get.remote(lineage, number, self.rank)
            batch = ray.get(call)  # the queue's own limit is on the wait
            if isinstance(batch, str):
                self._publish_again()
        if batch is not None and not batch.last:
            self._ahead = {number + 1: self.handle.get.remote(lineage, number + 1, self.rank)}
        return batch

    def commit(
        self, batch: Batch, stepped: bool, derived: dict[str, np.ndarray],
        weights: tuple[Version, list[Any]] | None = None, cut: str = "",
    ) -> None:  # fmt: skip
        """Report a step or skip, without waiting for the answer to a step: what the queue refused
        is raised by the next commit, or by `settle`.

        weights: of the version that it made, for actors. cut: the checkpoint that ends with it.
        """
        if weights is not None:
            self._published.append(weights)
        if self._commit is not None:  # Ray may run an asyncio actor's calls in another order
            ray.get(self._commit)  # the wait has no limit, as that for a batch has none here
        self._commit = self.handle.commit.remote(
            batch.lineage, batch.number, self.rank, stepped, derived,
            None if weights is None else weights[1], cut,
        )  # fmt: skip
        if not stepped:
            self._ahead = {}  # it was tagged as if this one had stepped
            ray.get(self._commit)  # nor may the next `get` come before it

    def settle(self) -> None:
        """Wait until the queue has taken the last commit; what it refused is raised."""
        if self._commit is not None:
            ray.get(self._commit, timeout=self.wait_seconds)

    def publish(self, version: Version, weights: list[Any]) -> None:
        """Make weights known, and wait until they are."""
        self._published.append((version, weights))
        ray.get(self.handle.publish.remote(version, weights), timeout=self.wait_seconds)

    def _publish_again(self) -> None:
        calls = [self.handle.publish.remote(v, weights) for v, weights in self._published]
        ray.get(calls, timeout=self.wait_seconds)
