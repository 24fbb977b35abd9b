"""The queue's process as others see it: rollout actors, and learner ranks.

Rollouts and all that is said of each lease and batch go over connections (`learner.replay.wire`),
and so do weights that are few. Of others there are object references, which are Ray's to send: so
are the calls that have one, a commit that publishes and `weights`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray

from actors.actor import Lease
from actors.low_rank import LowRank
from actors.rollout import Rollouts, Version
from learner.replay.records import Batch
from learner.replay.wire.client import Wire
from learner.replay.wire.frames import Address

WEIGHTS = "weights"  # a restarted queue's answer to rank 0: publish again what you last published
WITHHELD = "withheld"  # in place of a lease's weights: the caller has them, or asks for them by Ray


def plain(weights: Any) -> bool:
    """Whether what is published of a version is all there, with no object reference in it."""
    return isinstance(weights, list) and isinstance(weights[0], np.ndarray)


def received(weights: Any, wait_seconds: float) -> np.ndarray:
    """Published weights or a reference as a flat array, merged with what they are relative to."""
    if isinstance(weights, ray.ObjectRef):
        weights = ray.get(weights, timeout=wait_seconds)
    if isinstance(weights, LowRank):
        return weights.onto(ray.get(weights.base[0], timeout=wait_seconds))
    flat: np.ndarray = weights
    return flat


def _address(handle: Any, wait_seconds: float) -> Address:
    """Where the queue's process listens; Ray restarts it meanwhile, or says why it does not."""
    address: Address = ray.get(handle.address.remote(), timeout=wait_seconds)
    return address


class ActorQueue:
    """`actors.actor.QueueClient` over a connection, and Ray for object references."""

    def __init__(self, handle: Any, wait_seconds: float, slot: int = 0) -> None:
        self.handle = handle
        self.wait_seconds = wait_seconds
        self.slot = slot
        self.wire = Wire(partial(_address, handle, wait_seconds))
        self._done = -1  # the last lease handed in
        self._probed: float | None = None  # for the next call to carry
        self._actor = -1
        self._put: int | None = None  # its put, which answers with the next lease, or fails
        self._weights: tuple[Version, Any] | None = None  # the last asked for

    def lease(self, actor: int) -> Lease | None:
        self._actor = actor
        while True:
            call, self._put = self._put, None
            if call is None:
                call = self.wire.call("lease", self._has(), actor, self.slot, self._done)
            answer = self.wire.answer(call, self.wait_seconds)
            if answer == "over":
                self.wire.close()
                return None
            if answer != "wait" and (lease := self._with_weights(answer)):
                return lease

    def _with_weights(self, lease: Lease) -> Lease | None:
        """The lease with what the queue has for its version; None where the lease is void, as its
        queue restarted since, or as others have it by now."""
        if lease.weights is None:
            return lease
        if lease.weights != WITHHELD:
            self._weights = lease.version, lease.weights
        elif self._weights is None or self._weights[0] != lease.version:
            call = self.handle.weights.remote(lease.id, lease.version)
            found = ray.get(call, timeout=self.wait_seconds)
            if found is None:
                return None
            self._weights = lease.version, found
        return replace(lease, weights=self._weights[1])

    def _has(self) -> Version | None:
        return self._weights[0] if self._weights is not None else None

    def newer(self, than: Version) -> Lease | None:
        """The newest weights that actors may have, once newer than these; None at the end."""
        while True:
            call = self.handle.newer.remote(than, self._carried())
            answer = ray.get(call, timeout=self.wait_seconds)
            if answer != "wait":
                return None if answer == "over" else answer

    def weights(self, lease: Lease) -> np.ndarray:
        return received(lease.weights[0], self.wait_seconds)

    def put(self, lease: Lease, block: Rollouts) -> None:
        self._done = lease.id
        handed = replace(lease, weights=None), block, self._carried()
        self._put = self.wire.call("exchange", self._has(), *handed, self._actor, self.slot)

    def probed(self, nats: float) -> None:
        self._probed = nats

    def _carried(self) -> float | None:
        nats, self._probed = self._probed, None
        return nats


class LearnerQueue:
    """The queue as one learner rank sees it.

    published: takes what is published, [weights or a reference, probe], and has what a restarted
    queue may ask for again.
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
        self.wire = Wire(partial(_address, handle, wait_seconds))
        self._published = published
        self._commit: Callable[[float | None], Any] | None = None  # waits for the last one
        self._ahead: dict[int, int] = {}  # the batch after the one in hand, on its way

    def get(self, lineage: int, number: int) -> Batch | None:
        """Wait for the rank's slice; None when the run was closed."""
        batch: Any = WEIGHTS
        while batch == WEIGHTS:
            call = self._ahead.pop(number, None)
            if call is None:
                call = self.wire.call("get", lineage, number, self.rank)
            batch = self.wire.answer(call)  # the queue's own limit is on the wait
            if isinstance(batch, str):
                self._publish_again()
        if batch is None:
            self.wire.close()
        elif not batch.last:
            self._ahead = {number + 1: self.wire.call("get", lineage, number + 1, self.rank)}
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
        self._settle(None)  # its successor may come by the other way, and would overtake it
        known = batch.lineage, batch.number, self.rank, stepped, derived
        due = weights[1] if weights is not None else None
        if due is None or plain(due):
            self._commit = partial(self.wire.answer, self.wire.call("commit", *known, due, cut))
        else:
            call = self.handle.commit.remote(*known, due, cut)
            self._commit = lambda seconds: ray.get(call, timeout=seconds)
        if not stepped:
            for ahead in self._ahead.values():  # tagged as if this one had stepped
                self.wire.forget(ahead)
            self._ahead = {}
        if not stepped or batch.last:  # nor may the next `get` come before it; or there is none
            self._settle(None)

    def settle(self) -> None:
        """Wait until the queue has taken the last commit; what it refused is raised."""
        self._settle(self.wait_seconds)

    def _settle(self, seconds: float | None) -> None:
        """Without a limit the wait is as long as the queue lives, as that for a batch is."""
        wait, self._commit = self._commit, None
        if wait is not None:
            wait(seconds)

    def publish(self, version: Version, weights: list[Any]) -> None:
        """Make weights known, and wait until they are."""
        self._published.append((version, weights))
        ray.get(self.handle.publish.remote(version, weights), timeout=self.wait_seconds)

    def _publish_again(self) -> None:
        calls = [self.handle.publish.remote(v, weights) for v, weights in self._published]
        ray.get(calls, timeout=self.wait_seconds)
