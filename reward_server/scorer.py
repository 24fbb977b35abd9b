"""The Ray Serve replica that scores: batches requests, calls the reward, splits the answers."""

import asyncio
import os
import sys
import time
from itertools import pairwise

import numpy as np
from ray import serve

from configs.schema import RewardConfig
from reward_server.client import Pairs
from reward_server.rewards import Scores, concatenate, identify, load, score_safely

MOST_REQUESTS = 64  # requests, each a lease, that one batch takes together
# None: requests gather while the call before theirs runs. 1 ms would cost an idle service 1.5 ms.
BATCH_WAIT_SECONDS = 0.0


class Scorer:
    """One replica. The reward is called in one thread, at most `reward.batch` responses a time.

    identity: that the service was deployed with; RuntimeError where the files here have another,
    so all replicas, also those that replace lost ones, are one scorer. Empty: not looked at.
    """

    def __init__(
        self, config: RewardConfig, folder: str, stall_s: float, threads: int, identity: str = ""
    ) -> None:
        _cap_threads(threads)
        self.identity = identify(config, identity)
        self.reward = load(config, folder)
        self.limit = config.batch
        self.stall_s = stall_s
        self.called_at: float | None = None  # time.monotonic() of the call in progress

    async def score(self, pairs: Pairs) -> Scores:
        """Scores of one request's pairs, which may share calls with other requests'."""
        return await self._score_batch(pairs)

    async def describe(self) -> str:
        """The reward's identity: kind and parameters."""
        return self.identity

    async def check_health(self) -> None:
        """Serve's health check: raises, and so has this replica replaced, if a call is stuck."""
        started = self.called_at
        if started is not None and time.monotonic() - started > self.stall_s:
            raise RuntimeError(f"{self.identity} has not returned for {self.stall_s:g} s")

    @serve.batch(max_batch_size=MOST_REQUESTS, batch_wait_timeout_s=BATCH_WAIT_SECONDS)
    async def _score_batch(self, requests: list[Pairs]) -> list[Scores]:
        return await asyncio.to_thread(self._score_all, requests)

    def _score_all(self, requests: list[Pairs]) -> list[Scores]:
        prompts, responses = [], []
        for request in requests:
            more_prompts, more_responses = request.unpack()
            prompts += more_prompts
            responses += more_responses
        parts = []
        for start in range(0, len(responses), self.limit):
            self.called_at = time.monotonic()
            these = slice(start, start + self.limit)
            try:
                parts.append(
                    score_safely(self.reward, prompts[these], responses[these], self.identity)
                )
            finally:
                self.called_at = None
        scores = concatenate(parts)
        ends = np.cumsum([len(request) for request in requests]).tolist()
        return [scores.slice(a, b) for a, b in pairwise([0, *ends])]


def _cap_threads(threads: int) -> None:
    """Before a user's module is imported, so that the libraries it brings obey."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
