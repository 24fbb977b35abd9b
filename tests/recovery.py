"""A queue with a journal, random actors and a learner at it, and what a restart must restore."""

from collections import Counter
from pathlib import Path

import numpy as np

from actors.actor import Lease
from actors.codec import decode, encode
from actors.rollout import REWARD_FAILED
from learner.replay import snapshot
from learner.replay.line import Rules
from learner.replay.queue import ReplayQueue
from learner.replay.service import QueueService
from learner.replay.settings import Settings
from tests.queues import answer, small

ACTORS = 3


def service(folder: Path, **changes) -> QueueService:
    plan = small(
        **(
            {"round_groups": 3, "passes": 2, "lockstep": False, "max_age": 20, "batches": 10_000}
            | changes
        )
    )
    return QueueService(Settings(plan, 1, Rules(2, 0.9, 1000), 60.0, str(folder / "journal")))


class Play:
    """Random actors and a learner on one service, one operation at a time."""

    def __init__(self, queue: QueueService, seed: int) -> None:
        self.queue, self.rng = queue, np.random.default_rng(seed)
        self.leases: list[Lease] = []
        self.lineage = 0

    async def publish(self) -> None:
        inner = self.queue.queue
        await self.queue.publish(inner.version, [f"w{inner.version.step}"])

    async def act(self) -> None:
        service, inner, rng = self.queue, self.queue.queue, self.rng
        action = rng.integers(4)
        if action == 0:
            actor = int(rng.integers(ACTORS))
            lease = inner.lease(actor)
            if lease:
                service._note({"do": "lease", "actor": actor, "slot": 0, "done": None})
                self.leases.append(lease)
        elif action == 1 and self.leases:
            lease = self.leases.pop(int(rng.integers(len(self.leases))))
            failures = {0: REWARD_FAILED} if rng.random() < 0.2 else None
            await service.put(lease, answer(lease, 2, failures))
        elif action == 2 and rng.random() < 0.1:
            await service.release(int(rng.integers(ACTORS)))
        elif not inner.finished and self.can_get():
            number = inner.committed
            stepped = bool(rng.random() < 0.9)
            derived = {"reference_logp_K": np.full(6 * inner.plan.groups_per_batch, number)}
            await service.commit(self.lineage, number, 0, stepped, derived, ["w"], "")
        assert inner.ledger.balanced

    def can_get(self) -> bool:
        """`QueueService.get` without the wait."""
        inner = self.queue.queue
        was_open, expired = inner.is_open(inner.committed), self.queue._expired()
        batch = inner.get(self.lineage, inner.committed, 0)
        if (batch and not was_open) or self.queue._expired() != expired:
            self.queue._note({"do": "freeze", "number": inner.committed})
        return batch is not None

    async def many(self, count: int) -> None:
        for _ in range(count):
            await self.act()


def state(queue: ReplayQueue) -> dict:
    """What `take` takes, without times and without weights, of which a restart knows none."""
    tree = decode(encode(snapshot.take(queue)))
    tree["weights"] = None
    for group in tree["held"]["groups"] if tree["held"] else ():
        group.pop()
    return tree


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


async def cut(play: Play, folder: Path) -> None:
    folder.mkdir()
    await play.queue.cut(play.queue.queue.committed, str(folder))
    await play.queue.written(play.queue.queue.committed, str(folder))


def positions_alive(queue: ReplayQueue) -> Counter[int]:
    return Counter(group.position for group in [*queue.line.groups, *queue.held])
