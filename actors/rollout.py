"""The one record of the system: rollouts as packed columns.

A *rollout* is one response to one prompt, a *group* the C rollouts of one prompt, a *block* the
groups of one lease. A block keeps each field once, as an array over all its rollouts or tokens, so
that moving thousands of rollouts costs a dozen buffers and not thousands of objects. Shapes:
G groups, C members each, N = G·C rollouts, K response tokens in all, P prompt tokens in all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pickle import PickleBuffer
from typing import Any, NamedTuple

import numpy as np

VALID, GENERATION_FAILED, REWARD_FAILED = 0, 1, 2
STATUS_NAMES = {GENERATION_FAILED: "generation_failed", REWARD_FAILED: "reward_failed"}

OFFLINE_STEP = -1
UNLABELLED = -1
UNSCORED = ""  # no reward, or one that came with the data


class Version(NamedTuple):
    """Which weights: `step` optimizer steps, in the `lineage` of that many learner restarts."""

    lineage: int
    step: int


class GroupId(NamedTuple):
    """Prompt position in the stream, and how often weights that made it were rolled back."""

    position: int
    incarnation: int


@dataclass
class Rollouts:
    """A block of G groups of C rollouts each, as packed columns (see the module's docstring).

    A member that failed has its reason in `status` and `failures`, and no reward. An
    offline rollout has step −1, and NaN where its log-probability or reward is unknown.
    """

    members: int  # C
    position_G: np.ndarray  # int64, prompt position
    incarnation_G: np.ndarray  # int32
    row_G: np.ndarray  # int64, stable id of the prompt in its data set
    prompt_offset_G1: np.ndarray  # int64, G + 1
    prompt_P: np.ndarray  # int32
    offset_N1: np.ndarray  # int64, N + 1
    token_K: np.ndarray  # int32
    logp_K: np.ndarray  # float32, nats, under the distribution that the token was sampled from
    lineage_K: np.ndarray  # int16, of the weights that made the token
    step_K: np.ndarray  # int32, of the weights that made the token
    reward_N: np.ndarray  # float32
    status_N: np.ndarray  # uint8, VALID or a failure
    truncated_N: np.ndarray  # bool, stopped by the token limit where an end token exists
    label_N: np.ndarray  # int8, 1 preferred or good, 0 not, −1 unlabelled
    scorer_N: np.ndarray  # uint8, whose the reward is: place in `scorers`
    scorers: list[str] = field(default_factory=lambda: [UNSCORED])  # identities of rewards
    temperature: float = 1.0
    failures: dict[int, str] = field(default_factory=dict)  # rollout → what went wrong
    derived: dict[str, np.ndarray] = field(default_factory=dict)  # learner's columns, over N or K

    @property
    def groups(self) -> int:
        return len(self.position_G)

    @property
    def length_N(self) -> np.ndarray:
        lengths: np.ndarray = self.offset_N1[1:] - self.offset_N1[:-1]  # np.diff, but faster
        return lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum([getattr(self, name).nbytes for name in _ARRAYS])

    def ids(self) -> list[GroupId]:
        return list(map(GroupId, self.position_G.tolist(), self.incarnation_G.tolist()))

    def prompt(self, group: int) -> np.ndarray:
        """Token ids of a group's prompt."""
        return self.prompt_P[self.prompt_offset_G1[group] : self.prompt_offset_G1[group + 1]]

    def response(self, rollout: int) -> np.ndarray:
        """Token ids of a rollout's response."""
        return self.token_K[self.offset_N1[rollout] : self.offset_N1[rollout + 1]]

    def oldest_step_N(self) -> np.ndarray:
        """Step of each rollout's oldest token, [N] int64; OFFLINE_STEP where there is none."""
        start_N = self.offset_N1[:-1]
        some_N = start_N < self.offset_N1[1:]  # the others take no tokens, so are no gap between
        if some_N.all():
            return np.minimum.reduceat(self.step_K, start_N).astype(np.int64)
        oldest_N = np.full(len(start_N), OFFLINE_STEP, dtype=np.int64)
        if some_N.any():
            oldest_N[some_N] = np.minimum.reduceat(self.step_K, start_N[some_N])
        return oldest_N

    def scored(self, rollouts: np.ndarray, reward: np.ndarray, identity: str) -> None:
        """Enter the rewards of these rollouts, all from the scorer with this identity."""
        if identity not in self.scorers:
            self.scorers = [*self.scorers, identity]
        self.reward_N[rollouts] = reward
        self.scorer_N[rollouts] = self.scorers.index(identity)

    def scorer(self, rollout: int) -> str:
        """The identity of what scored a rollout, or UNSCORED."""
        return self.scorers[self.scorer_N[rollout]]

    def fail(self, rollout: int, status: int, why: str) -> None:
        """State a failure of one rollout."""
        self.status_N[rollout] = status
        self.reward_N[rollout] = np.nan
        self.scorer_N[rollout] = self.scorers.index(UNSCORED)
        self.failures[rollout] = why

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Between processes a small block goes as one buffer, for each costs more than its bytes.

        A large one goes column by column, which copies nothing, and so does one whose columns are
        anything but arrays.
        """
        rest = dict(vars(self))
        plain = all(type(rest[name]) is np.ndarray for name in _ARRAYS)
        if protocol < 5 or not plain or self.nbytes > _ONE_BUFFER:
            return super().__reduce_ex__(protocol)
        arrays = [np.ascontiguousarray(rest.pop(name)) for name in _ARRAYS]
        form = tuple([(array.dtype.str, len(array)) for array in arrays])
        return _unpacked, (form, PickleBuffer(b"".join([a.data for a in arrays])), rest)

    def select(self, start: int, stop: int) -> "Rollouts":
        """Groups start … stop − 1 as a block of views."""
        n0, n1 = start * self.members, stop * self.members
        k0, k1 = self.offset_N1[n0], self.offset_N1[n1]
        p0, p1 = self.prompt_offset_G1[start], self.prompt_offset_G1[stop]
        cut = {"G": (start, stop), "N": (n0, n1), "K": (k0, k1), "P": (p0, p1)}
        columns = {name: getattr(self, name)[slice(*cut[name[-1]])] for name in _COLUMNS}
        derived = {name: column[slice(*cut[name[-1]])] for name, column in self.derived.items()}
        return Rollouts(
            members=self.members,
            prompt_offset_G1=self.prompt_offset_G1[start : stop + 1] - p0,
            offset_N1=self.offset_N1[n0 : n1 + 1] - k0,
            scorers=self.scorers,
            temperature=self.temperature,
            failures={r - n0: why for r, why in self.failures.items() if n0 <= r < n1},
            derived=derived,
            **columns,
        )


_ONE_BUFFER = 2**18  # bytes of a block up to which it is copied into one
_ARRAYS = (  # the widest items first, so that each is aligned in the one buffer
    "position_G", "row_G", "prompt_offset_G1", "offset_N1",
    "incarnation_G", "prompt_P", "token_K", "logp_K", "step_K", "reward_N",
    "lineage_K", "status_N", "truncated_N", "label_N", "scorer_N",
)  # fmt: skip
_dtype = cache(np.dtype)  # by what a column says of itself: to read that costs as much as the rest


def _unpacked(
    form: tuple[tuple[str, int], ...], buffer: Any, rest: dict[str, Any]
) -> Rollouts:  # fmt: skip
    """A block again, of views of the one buffer that `__reduce_ex__` made."""
    start = 0
    for name, (code, count) in zip(_ARRAYS, form):
        dtype = _dtype(code)
        rest[name] = np.ndarray((count,), dtype, buffer, start)
        start += count * dtype.itemsize
    return Rollouts(**rest)


Join = Callable[[list[np.ndarray]], np.ndarray]
_COLUMNS = [f.name for f in fields(Rollouts) if f.name[-2:] in {"_G", "_N", "_K", "_P"}]


def concatenate(blocks: list[Rollouts], join: Join = np.concatenate) -> Rollouts:
    """The blocks' groups in order, as one block. Derived columns are kept where all have them.

    join: makes one of the arrays of tokens.
    """
    if not blocks:
        raise ValueError("no blocks to concatenate")
    if len({(b.members, b.temperature) for b in blocks}) > 1:
        raise ValueError("blocks differ in group size or temperature")
    first = blocks[0]
    if len(blocks) == 1:
        return first
    shared = set(first.derived).intersection(*(b.derived for b in blocks[1:]))
    starts = np.cumsum([0] + [len(b.reward_N) for b in blocks])
    scorers = list(dict.fromkeys(name for b in blocks for name in b.scorers))
    columns = {
        name: (join if name.endswith("_K") else np.concatenate)([getattr(b, name) for b in blocks])
        for name in _COLUMNS
    }
    columns["scorer_N"] = np.concatenate([_places(b, scorers)[b.scorer_N] for b in blocks])
    return Rollouts(
        members=first.members,
        prompt_offset_G1=_join_offsets([b.prompt_offset_G1 for b in blocks]),
        offset_N1=_join_offsets([b.offset_N1 for b in blocks]),
        scorers=scorers,
        temperature=first.temperature,
        failures={int(s) + r: w for s, b in zip(starts, blocks) for r, w in b.failures.items()},
        derived={n: np.concatenate([b.derived[n] for b in blocks]) for n in sorted(shared)},
        **columns,
    )


def _places(block: Rollouts, scorers: list[str]) -> np.ndarray:
    """Where each of a block's scorers is among `scorers`."""
    return np.array([scorers.index(name) for name in block.scorers], dtype=np.uint8)


def offsets(lengths: list[int] | np.ndarray) -> np.ndarray:
    """Lengths [n] to offsets [n + 1], int64, starting at 0."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _join_offsets(parts: list[np.ndarray]) -> np.ndarray:
    return offsets(np.concatenate([np.diff(part) for part in parts]))
