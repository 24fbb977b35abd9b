"""The Ray actors of `benchmarks.queue`: our queue, a plain list, producers and the consumer."""

import gc
import time
from collections import defaultdict, deque
from typing import Any

import psutil
import ray

from actors.rollout import Rollouts, Version
from benchmarks.queue_payload import as_leased, block_of
from learner.replay.clients import ActorQueue, LearnerQueue
from learner.replay.service import QueueService
from learner.replay.settings import Settings

WAIT_SECONDS = 120.0
TIMED = ("lease", "put", "get", "commit")  # of ReplayQueue


class Measured:
    """What both stores tell of their process."""

    def process(self) -> dict[str, float]:
        """CPU seconds of all threads so far, and bytes of memory that are its own."""
        gc.collect()
        return {"cpu": time.process_time(), "bytes": psutil.Process().memory_full_info().uss}


class BenchQueue(QueueService, Measured):
    """The queue's service as it is, that can be emptied, filled and looked at."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.spent: defaultdict[str, float] = defaultdict(float)

    async def begin(self, rollouts: int, tokens: int) -> None:
        """An empty queue with so many rollouts put into it, by leases as they are issued."""
        self.queue = self._new()
        gc.collect()  # the queue before is a cycle by `_timed`
        self.queue.lineages.kept = None
        self.queue.publish(Version(0, 0), ["weights"])
        while self.queue.ledger.queued < rollouts:
            lease = self.queue.lease(0)
            assert lease is not None
            fresh = block_of(len(lease.groups), tokens, lease.id)
            self.queue.put(lease, as_leased(fresh, lease.groups))
        self.spent.clear()
        for name in TIMED:
            setattr(self.queue, name, self._timed(name))

    def _timed(self, name: str) -> Any:
        plain = getattr(self.queue, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(*arguments)
            finally:
                self.spent[name] += time.perf_counter() - started

        return timed

    async def books(self) -> dict[str, Any]:
        """Counts of the ledger, ages and reuses seen, and seconds within the queue by method."""
        ledger = self.queue.ledger
        return {
            **ledger.counts(), "ages": len(ledger.age), "reuses": len(ledger.reuse),
            "committed": self.queue.committed, "spent": dict(self.spent),
        }  # fmt: skip


class PlainList(Measured):
    """A list of blocks: it tags and accounts nothing. It is read in turns."""

    def begin(self, blocks: int, groups: int, tokens: int) -> None:
        """Empty but for so many blocks of so many groups."""
        self.next = 0
        self.blocks = [block_of(groups, tokens, seed) for seed in range(blocks)]

    def put(self, block: Rollouts) -> None:
        self.blocks.append(block)

    def get(self, blocks: int) -> list[Rollouts]:
        start = self.next if self.next + blocks <= len(self.blocks) else 0
        self.next = start + blocks
        return self.blocks[start : start + blocks]


class AsyncList(PlainList):
    """The same in an asyncio actor, as our queue is one: what Ray's asyncio costs."""

    async def put(self, block: Rollouts) -> None:  # type: ignore[override]
        self.blocks.append(block)


class Producer:
    """Puts leases of one payload, as fast as it can, with so many calls on the way.

    Times are those of the clock that all processes of a machine share.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def load(self, groups: int, tokens: int, in_flight: int) -> None:
        """What it is to put, and how many at once: to ours, the leases that it has in hand."""
        self.block = block_of(groups, tokens, self.index)
        self.in_flight = in_flight

    def ours(self, queue: Any, start: float, seconds: float) -> tuple[int, float]:
        """Rollouts put from `start` on, and when the last was in."""
        clients = [ActorQueue(queue, WAIT_SECONDS, slot) for slot in range(self.in_flight)]
        done = _wait(start)
        while time.monotonic() - start < seconds:
            for client in clients:
                lease = client.lease(self.index)  # raises where its last put failed
                assert lease is not None
                client.put(lease, as_leased(self.block, lease.groups))
                done += len(lease.groups) * self.block.members
        for client in clients:
            client.lease(self.index)
            client.wire.close()
        return done, time.monotonic()

    def plain(self, store: Any, start: float, seconds: float) -> tuple[int, float]:
        """The same, into a plain list."""
        ids = self.block.ids()
        done, calls = _wait(start), deque[Any]()
        while time.monotonic() - start < seconds:
            calls.append(store.put.remote(as_leased(self.block, ids)))
            if len(calls) == self.in_flight:
                ray.get(calls.popleft(), timeout=WAIT_SECONDS)
            done += len(self.block.reward_N)
        ray.get(list(calls), timeout=WAIT_SECONDS)
        return done, time.monotonic()


class Consumer:
    """Takes minibatches as a learner's rank does: one is fetched ahead of the one in hand."""

    def ours(self, queue: Any, samples: int, first: int) -> float:
        """Rollouts per second. first: number of the first batch."""
        client, number = LearnerQueue(queue, 0, WAIT_SECONDS, deque(maxlen=2)), first
        done, started = 0, time.perf_counter()
        while done < samples:
            batch = client.get(0, number)
            assert batch is not None and batch.block is not None
            assert len(batch.block.token_K) == batch.block.offset_N1[-1]
            done += len(batch.block.reward_N)
            client.commit(batch, True, {})
            number += 1
        client.settle()
        seconds = time.perf_counter() - started
        for call in client._ahead.values():
            client.wire.answer(call)
        client.wire.close()
        return done / seconds

    def plain(self, store: Any, samples: int, blocks: int) -> float:
        """The same from a plain list, which it gets as blocks and does not join."""
        done, started = 0, time.perf_counter()
        ahead = store.get.remote(blocks)
        while done < samples:
            found = ray.get(ahead, timeout=WAIT_SECONDS)
            ahead = store.get.remote(blocks)
            done += sum(len(block.reward_N) for block in found)
        seconds = time.perf_counter() - started
        ray.get(ahead)
        return done / seconds


def _wait(start: float) -> int:
    time.sleep(max(0.0, start - time.monotonic()))
    return 0
