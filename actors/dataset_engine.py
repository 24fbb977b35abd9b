"""The dataset engine: offline rollouts take the way of generated ones, from a file.

Position p in the stream is row p mod n of the data set; its epoch is p // n. So a position is all
that a checkpoint keeps, whether the rows are in memory or streamed.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from actors.buffered import Buffered
from actors.engine import Request
from actors.preferences import OfflineGroup, to_rollouts
from actors.prompts import Prompt
from actors.rollout import OFFLINE_STEP, Rollouts, Version


class Groups(Protocol):
    """Groups by position, without end: row and group. A row is also the first position of it."""

    def __getitem__(self, position: int) -> tuple[int, OfflineGroup]: ...


def in_memory(groups: Sequence[OfflineGroup]) -> Groups:
    """Groups that are all there."""
    return Buffered(groups, len(groups) + 1)


class DatasetPrompts:
    """Prompts of an offline data set by position."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def __getitem__(self, position: int) -> Prompt:
        row, group = self._groups[position]
        return Prompt(group.prompt_ids, row)


class DatasetEngine:
    """Answers each prompt with the responses that the data set has for it (no weights needed)."""

    def __init__(self, groups: Groups, temperature: float) -> None:
        self.version = Version(0, OFFLINE_STEP)
        self._groups = groups
        self._temperature = temperature

    def load(self, weights: np.ndarray, version: Version) -> None:
        raise RuntimeError("a data set has no weights")

    def score(self, text_NT: np.ndarray) -> np.ndarray:
        raise RuntimeError("a data set has no weights")

    def generate(self, requests: Sequence[Request], stream: str) -> Rollouts:
        return to_rollouts(
            [self._groups[request.prompt.row][1] for request in requests],
            [request.id.position for request in requests],
            [request.id.incarnation for request in requests],
            [request.prompt.row for request in requests],
            self._temperature,
        )

    def close(self) -> None:
        pass
