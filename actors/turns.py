"""Learner and actor on one GPU: the engine sleeps while it is the learner's turn.

In lockstep the learner's turn begins once a round's last lease is put, and ends when the next lease
is given. So the engine goes to sleep before each put and wakes at each lease; `RolloutActor` sees a
queue like any other.
"""

from typing import Protocol

import numpy as np

from actors.actor import Lease, QueueClient
from actors.rollout import Rollouts


class Sleeper(Protocol):
    """An engine that can give its GPU memory back for a while."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class TurnTaking:
    """`actors.actor.QueueClient` whose engine holds GPU memory from lease to put only."""

    def __init__(self, queue: QueueClient, engine: Sleeper) -> None:
        self.queue = queue
        self.engine = engine
        engine.sleep()  # until the first lease

    def lease(self, actor: int) -> Lease | None:
        lease = self.queue.lease(actor)
        if lease is not None:
            self.engine.wake()
        return lease

    def weights(self, lease: Lease) -> np.ndarray:
        return self.queue.weights(lease)

    def put(self, lease: Lease, block: Rollouts) -> None:
        self.engine.sleep()
        self.queue.put(lease, block)

    def probed(self, nats: float) -> None:
        self.queue.probed(nats)
