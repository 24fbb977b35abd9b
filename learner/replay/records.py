"""What the queue keeps of a group, and what it hands to a learner rank."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.rollout import VALID, GroupId, Join, Rollouts, concatenate


@dataclass
class Held:
    """A group in the queue: where its columns are, and what is tagged onto it."""

    block: Rollouts
    place: int  # group within the block
    entered: float  # time.monotonic()
    valid_C: np.ndarray
    oldest_C: np.ndarray  # step of each member's oldest token
    valid: int  # members
    oldest: int  # of the valid ones
    reuse: int = 0  # committed consumptions
    derived: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, block: Rollouts, place: int, oldest_N: np.ndarray | None = None) -> "Held":
        """A block's group, entering now. oldest_N: its `oldest_step_N`, if that is known.

        ValueError where no member is valid.
        """
        rows = slice(place * block.members, (place + 1) * block.members)
        oldest_C = (block.oldest_step_N() if oldest_N is None else oldest_N)[rows]
        valid_C = block.status_N[rows] == VALID
        valid = int(np.count_nonzero(valid_C))
        oldest = int((oldest_C if valid == len(valid_C) else oldest_C[valid_C]).min())
        return cls(block, place, time.monotonic(), valid_C, oldest_C, valid, oldest)

    @property
    def tokens(self) -> int:
        """Response tokens of all members."""
        first = self.place * self.block.members
        return int(self.block.offset_N1[first + self.block.members] - self.block.offset_N1[first])

    @property
    def prompt_tokens(self) -> int:
        offset_G1 = self.block.prompt_offset_G1
        return int(offset_G1[self.place + 1] - offset_G1[self.place])

    def rows(self, column: str) -> np.ndarray:
        """The group's C values of a rollout column of its block."""
        members = self.block.members
        whole: np.ndarray = getattr(self.block, column)
        return whole[self.place * members : (self.place + 1) * members]


def columns(held: Sequence[Held], join: Join = np.concatenate) -> Rollouts | None:
    """The groups as one block, with what the learner derived for all of them; None for none.

    Neighbours of one block are cut out of it together, as views: a lease is usually consumed whole.
    """
    runs: list[list[Held]] = []
    for group in held:
        last = runs[-1][-1] if runs else None
        if last is not None and last.block is group.block and last.place + 1 == group.place:
            runs[-1].append(group)
        else:
            runs.append([group])
    return concatenate([_run(run) for run in runs], join) if runs else None


def _run(held: list[Held]) -> Rollouts:
    """Groups that stand side by side in one block."""
    out = held[0].block.select(held[0].place, held[-1].place + 1)
    shared = set(held[0].derived).intersection(*(group.derived for group in held[1:]))
    out.derived = {n: np.concatenate([h.derived[n] for h in held]) for n in sorted(shared)}
    return out


@dataclass(frozen=True)
class Index:
    """A whole minibatch's small columns, the same for every rank; M rollouts in group order."""

    reward_M: np.ndarray
    label_M: np.ndarray
    valid_M: np.ndarray  # bool
    prompt_M: np.ndarray  # tokens of the prompt
    length_M: np.ndarray  # of the response
    truncated_M: np.ndarray  # bool
    age_M: np.ndarray  # int64; meaningless where offline
    reuse_M: np.ndarray  # this consumption included
    offline: bool


@dataclass(frozen=True)
class Batch:
    """What a rank gets of one minibatch: its slice, and the index of the whole."""

    lineage: int
    number: int
    step: int  # optimizer steps in the weights that consume it
    round: int
    first: int  # the slice's first rollout within the minibatch
    block: Rollouts | None  # None where a rank has no group
    index: Index
    round_rewards: np.ndarray  # of the round's valid rollouts, float32
    measures: dict[str, Any]  # queue_seconds, depth and ledger counts at the first call
    last: bool  # of the run


@dataclass
class Open:
    """A frozen batch, and the ranks' reports on it."""

    number: int
    step: int
    round: int
    ids: list[GroupId]
    index: Index
    measures: dict[str, Any]
    reports: dict[int, tuple[bool, dict[str, np.ndarray]]] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether a rank has said that it skipped."""
        return not all(stepped for stepped, _ in self.reports.values())


def index(held: Sequence[Held], reuse: Sequence[np.ndarray], step: int, offline: bool) -> Index:
    """The index of groups consumed at a step; reuse: [C] a group, this consumption included."""

    def column(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    def lengths(h: Held) -> np.ndarray:
        members = h.block.members
        offset_N1 = h.block.offset_N1[h.place * members : (h.place + 1) * members + 1]
        length_C: np.ndarray = offset_N1[1:] - offset_N1[:-1]
        return length_C

    return Index(
        reward_M=column([h.rows("reward_N") for h in held], np.float32),
        label_M=column([h.rows("label_N") for h in held], np.int8),
        valid_M=column([h.valid_C for h in held], bool),
        prompt_M=np.repeat(
            np.array([h.prompt_tokens for h in held], dtype=np.int64),
            [len(h.valid_C) for h in held],
        ),
        length_M=column([lengths(h) for h in held], np.int64),
        truncated_M=column([h.rows("truncated_N") for h in held], bool),
        age_M=step - column([h.oldest_C for h in held], np.int64),
        reuse_M=column(list(reuse), np.int64),
        offline=offline,
    )
