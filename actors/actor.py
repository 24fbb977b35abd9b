"""The rollout actor: lease prompts, generate, have them scored, put them into the queue.

It knows the queue and the reward service only as the two Protocols below; `cluster` hands it the
real ones. It keeps no books: whatever it was leased is the queue's to issue again if it dies.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from actors.engine import Request, RolloutEngine
from actors.probe import Probe, mismatch
from actors.prompts import Prompt
from actors.rollout import REWARD_FAILED, UNLABELLED, VALID, GroupId, Rollouts, Version
from configs import faults


@dataclass(frozen=True)
class Lease:
    """Consecutive prompts to generate whole, under one version of the weights.

    weights: a list of whatever `QueueClient.weights` turns into the flat array and, where there is
    one, the learner's probe of it; None for offline data.
    """

    id: int
    groups: tuple[GroupId, ...]
    version: Version
    weights: Any = None

    @property
    def probe(self) -> Probe | None:
        """The probe text with the learner's scores under these weights."""
        return self.weights[1] if self.weights is not None and len(self.weights) > 1 else None

    def __reduce__(self) -> Any:
        """As plain numbers between processes: an object within costs more than all of them."""
        flat = [number for group in self.groups for number in group]
        return _lease, (self.id, flat, tuple(self.version), self.weights)


def _lease(id_: int, flat: list[int], version: tuple[int, int], weights: Any) -> Lease:
    groups = tuple(GroupId(*pair) for pair in zip(flat[::2], flat[1::2]))
    return Lease(id_, groups, Version(*version), weights)


class Scores(Protocol):
    """Rewards [n] float32, NaN exactly where `failures` states why there is none; and whose."""

    reward: np.ndarray
    failures: dict[int, str]
    identity: str


class RewardClient(Protocol):
    """The reward service, as an actor sees it."""

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], timeout_s: float
    ) -> Scores:
        """Scores of n responses to n prompts, token ids. Never raises for a failed reward."""


class QueueClient(Protocol):
    """The replay queue, as an actor sees it."""

    def lease(self, actor: int) -> Lease | None:
        """The next prompts to generate, waiting for them; None when the run is over."""

    def weights(self, lease: Lease) -> np.ndarray:
        """The flat weights of the lease's version."""

    def put(self, lease: Lease, block: Rollouts) -> None:
        """Hand in a lease's groups, all members terminal. Idempotent by group id."""

    def probed(self, nats: float) -> None:
        """How far the engine's scores of the probe text are from the learner's; no call of its
        own, a later one carries it."""


class Prompts(Protocol):
    """Prompts by position in the stream."""

    def __getitem__(self, position: int) -> Prompt: ...


class RolloutActor:
    """Serves leases until the queue has no more. One engine, one lease at a time."""

    def __init__(
        self, index: int, engine: RolloutEngine, prompts: Prompts, queue: QueueClient,
        rewards: RewardClient, reward_seconds: float,
    ) -> None:  # fmt: skip
        self.index = index
        self.engine = engine
        self.prompts = prompts
        self.queue = queue
        self.rewards = rewards
        self.reward_seconds = reward_seconds
        self.seconds = {"lease": 0.0, "load": 0.0, "generate": 0.0, "score": 0.0, "put": 0.0}

    def run(self) -> dict[str, float]:
        """Serve until the run is over; returns the seconds spent on each part."""
        while (lease := self._timed("lease", self.queue.lease, self.index)) is not None:
            self._timed("load", self._take_weights, lease)
            requests = self._requests(lease)
            block = self._timed("generate", self.engine.generate, requests, "rollout")
            self._timed("score", score, block, self.rewards, self.reward_seconds)
            self._timed("put", self.queue.put, lease, block)
        return self.seconds

    def _requests(self, lease: Lease) -> list[Request]:
        return [Request(group, self.prompts[group.position]) for group in lease.groups]

    def _take_weights(self, lease: Lease) -> None:
        if lease.version != self.engine.version and lease.weights is not None:
            load(self.engine, lease, self.queue)

    def _timed(self, part: str, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        faults.hit(f"actor.{part}.before")
        try:
            answer = call(*arguments)
        finally:
            self.seconds[part] += time.perf_counter() - start
        faults.hit(f"actor.{part}.after")
        return answer


def load(engine: RolloutEngine, lease: Lease, queue: QueueClient) -> None:
    """Give the engine a lease's weights, and probe whether it has taken them."""
    engine.load(queue.weights(lease), lease.version)
    if (sent := lease.probe) is not None:
        queue.probed(mismatch(engine.score(sent.text_NT), sent.logp_NL))


def score(block: Rollouts, rewards: RewardClient, timeout_s: float) -> None:
    """Fill in the rewards of a block's valid rollouts that have neither reward nor label, or state
    their failures."""
    unknown_N = np.isnan(block.reward_N) & (block.label_N == UNLABELLED)
    wanted = np.flatnonzero((block.status_N == VALID) & unknown_N)
    if not len(wanted):
        return
    prompts = [block.prompt(group).tolist() for group in range(block.groups)]
    asked = [prompts[n // block.members] for n in wanted]
    scores = rewards.score(asked, [block.response(n).tolist() for n in wanted], timeout_s)
    block.scored(wanted, scores.reward, scores.identity)
    for place, why in scores.failures.items():
        block.fail(int(wanted[place]), REWARD_FAILED, why)
