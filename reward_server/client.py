"""How others ask the reward service: packed pairs over a Serve handle, answers as `Scores`."""

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from actors.rollout import offsets
from reward_server.rewards import Scores, brief

_handles: dict[str, DeploymentHandle] = {}  # of this process, by `RewardClient.service`

ATTEMPTS = 3
BACKOFF_SECONDS = 0.2  # before the second attempt; doubled before each one after it

# Serve tells of every handle at INFO, on the stderr that a run's progress is written to.
logging.getLogger("ray.serve").setLevel(logging.WARNING)


@dataclass
class Pairs:
    """N (prompt, response) pairs as packed columns; neighbours with one prompt share its tokens."""

    prompt_P: np.ndarray  # int32, prompt tokens
    prompt_offset_U1: np.ndarray  # int64, one more than prompts kept
    prompt_N: np.ndarray  # int32, which of the prompts kept
    token_K: np.ndarray  # int32, response tokens
    offset_N1: np.ndarray  # int64, N + 1

    def __len__(self) -> int:
        return len(self.prompt_N)

    @classmethod
    def pack(cls, prompts: list[list[int]], responses: list[list[int]]) -> "Pairs":
        """ValueError if there are not as many prompts as responses."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        kept: list[list[int]] = []
        prompt_N = np.empty(len(prompts), dtype=np.int32)
        for i, prompt in enumerate(prompts):
            if not kept or (prompt is not kept[-1] and list(prompt) != list(kept[-1])):
                kept.append(prompt)
            prompt_N[i] = len(kept) - 1
        return cls(*_pack(kept), prompt_N, *_pack(responses))

    def unpack(self) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, responses), N each."""
        kept = _unpack(self.prompt_P, self.prompt_offset_U1)
        return [kept[i] for i in self.prompt_N.tolist()], _unpack(self.token_K, self.offset_N1)


class RewardClient:
    """The reward service as others see it. Picklable, so it travels into Ray actors."""

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        self.handle = handle
        self.name = name
        self.service = uuid.uuid4().hex

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Whatever comes to a process for one service shares a handle there: each has a router,
        whose loop goes on until the process ends, and a study's processes serve many runs."""
        self.__dict__.update(state)
        self.handle = _handles.setdefault(self.service, self.handle)

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], timeout_s: float
    ) -> Scores:
        """Score n responses within `timeout_s` seconds in all, attempts and pauses included.

        Where the service does not answer, all n are stated failures that name what happened. Not
        for an event loop's own thread (RuntimeError): call it through `asyncio.to_thread` there.
        """
        _refuse_event_loop()
        pairs = Pairs.pack(prompts, responses)
        if not len(pairs):
            return Scores(np.empty(0, dtype=np.float32))
        deadline, problem = time.monotonic() + timeout_s, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                pause = BACKOFF_SECONDS * 2 ** (attempt - 1)
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            try:
                return self._ask(pairs, deadline - time.monotonic())
            except TimeoutError:
                problem = f"no answer for {timeout_s:g} s" + (f", after {problem}" * bool(problem))
                break
            except Exception as error:  # a lost replica, back-pressure, a cluster going down
                problem = f"attempt {attempt + 1} of {ATTEMPTS}: {brief(error)}"
        return Scores.failed(len(pairs), f"reward service {self.name!r}: {problem}")

    def _ask(self, pairs: Pairs, timeout_s: float) -> Scores:
        response = self.handle.score.remote(pairs)
        try:
            return response.result(timeout_s=max(0.0, timeout_s))
        except TimeoutError:
            response.cancel()
            raise

    def describe(self, timeout_s: float) -> str:
        """Identity of the reward served: kind and parameters. TimeoutError after `timeout_s`."""
        return self.handle.describe.remote().result(timeout_s=timeout_s)


def _refuse_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError("RewardClient.score blocks: call it through asyncio.to_thread here")


def _pack(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offset = offsets([len(row) for row in rows])
    return np.fromiter(chain.from_iterable(rows), np.int32, int(offset[-1])), offset


def _unpack(token_K: np.ndarray, offset_N1: np.ndarray) -> list[list[int]]:
    tokens, offset = token_K.tolist(), offset_N1.tolist()
    return [tokens[start:stop] for start, stop in pairwise(offset)]
