"""Algorithm 1 in one process, from the real parts, without Ray: what unit tests run.

Actors and learner take turns over the real queue; nothing is mocked but the service around it.
"""

import itertools
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np

from actors.actor import Lease, RolloutActor
from actors.rollout import OFFLINE_STEP, Rollouts, Version
from actors.torch_engine import TorchEngine
from cluster import inputs
from configs.choices import DataSource
from configs.load import prepare
from configs.schema import Config
from learner.engine import join
from learner.learner import Learner, StepRecord
from learner.replay.queue import ReplayQueue
from learner.replay.settings import rules
from learner.replay.staleness import plan
from reward_server.rewards import InProcess


class LocalQueue:
    """`actors.actor.QueueClient` without a process in between; gives up where it would wait."""

    def __init__(self, queue: ReplayQueue) -> None:
        self.queue = queue

    def lease(self, actor: int) -> Lease | None:
        return self.queue.lease(actor)

    def weights(self, lease: Lease) -> np.ndarray:
        return lease.weights[0]

    def put(self, lease: Lease, block: Rollouts) -> None:
        self.queue.put(lease, block)

    def probed(self, nats: float) -> None:
        self.queue.probed(nats)


class LocalRewards(InProcess):
    """The reward of a configuration, in this process."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.reward)


def settings(preset: str, *overrides: str) -> Config:
    return prepare(preset, list(overrides))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_queue(config: Config) -> ReplayQueue:
    return ReplayQueue(plan(config), config.learner.ranks, rules(config))


class Local:
    """Actors, queue and learner of a configuration, stepped by hand.

    rank, port: of several ranks, in a process each with a queue of its own; what the other ranks
    derive is not in it.
    """

    def __init__(self, config: Config, actors: int = 1, rank: int = 0, port: int = 0) -> None:
        join(rank, config.learner.ranks, ("127.0.0.1", port or free_port()), 1)
        self.config, self.rank = config, rank
        self.queue = new_queue(config)
        self.learner = Learner(config, rank)
        self._publish()
        prompts = inputs.prompts(config)
        self.actors = [
            RolloutActor(i, self._engine(), prompts, LocalQueue(self.queue),
                         LocalRewards(config), 10.0)
            for i in range(actors)
        ]  # fmt: skip

    def _engine(self) -> TorchEngine:
        """Offline it stays at π_ref, as whoever samples the data set of a run does."""
        engine = TorchEngine(self.config)
        if self.config.data.source is DataSource.offline:
            engine.load(self.learner.weights(), Version(0, OFFLINE_STEP))
        return engine

    def generate(self) -> None:
        """Let the actors, in turn, serve leases until none is admitted."""
        turns = itertools.cycle(self.actors)
        while self._serve(next(turns)):
            pass

    def _serve(self, actor: RolloutActor) -> bool:
        lease = self.queue.lease(actor.index)
        if lease is None:
            return False
        actor.queue = _Once(self.queue, lease)
        actor.run()
        return True

    def steps(self, count: int) -> Iterator[StepRecord]:
        """Consume batches, generating whatever is admitted before each."""
        for number in range(self.queue.committed, self.queue.committed + count):
            self.generate()
            batch = self.queue.get(0, number, self.rank)
            assert batch is not None, self.queue.missing(number)
            record, derived = self.learner.consume(batch)
            for rank in range(self.config.learner.ranks):
                mine = derived if rank == self.rank else None
                self.queue.commit(0, number, rank, record.stepped, mine)
            if self.learner.publishes(number):
                self._publish()
            yield record

    def _publish(self) -> None:
        published = [self.learner.weights().copy(), self.learner.probe()]
        self.queue.publish(self.learner.version, published)


class _Once(LocalQueue):
    """Hands out one lease, taken before."""

    def __init__(self, queue: ReplayQueue, lease: Lease) -> None:
        super().__init__(queue)
        self._leases = [lease]

    def lease(self, actor: int) -> Lease | None:
        return self._leases.pop() if self._leases else None


def balanced(ledger: dict[str, Any]) -> bool:
    """Whether all rollouts of a summary's ledger are accounted for."""
    return ledger["issued"] == ledger["in_flight"] + ledger["queued"] + sum(
        ledger["retired"].values()
    )
