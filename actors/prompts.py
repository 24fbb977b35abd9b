"""The endless, resumable stream of prompts: a position is all that a checkpoint keeps.

    stream = open_prompts(config.prompts, config.seed, vocabulary=100, max_tokens=6)
    stream[position].ids

Position p is row p mod n of epoch p // n, in the data's order, or in an order drawn anew for each
epoch from (seed, epoch) alone. So any actor, and any resumed run, finds the same prompt there.
Rows dropped for their length have no position.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.prompt_rows import PromptError, PromptRows, Tokenize
from actors.randomness import stream_key
from actors.rollout import offsets
from actors.row_limits import RowCounts
from configs.schema import PromptsConfig

__all__ = ["Prompt", "PromptError", "PromptStream", "Prompts", "StreamedPrompts", "open_prompts"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt. ids: int32 token ids [P]. row: its stable number in the data set, from 0."""

    ids: np.ndarray
    row: int


class Prompts(Protocol):
    """Prompts by position, without end. counts: of the rows read so far."""

    counts: RowCounts

    @property
    def rows(self) -> int:
        """n, the prompts of one epoch."""

    def __getitem__(self, position: int) -> Prompt: ...


def open_prompts(
    config: PromptsConfig, seed: int, vocabulary: int, max_tokens: int,
    tokenizer: Tokenize | None = None,
) -> Prompts:  # fmt: skip
    """The stream that `prompts.streaming` asks for; arguments as `PromptStream` has them."""
    kind = StreamedPrompts if config.streaming else PromptStream
    return kind(config, seed, vocabulary, max_tokens, tokenizer)


class PromptStream:
    """Prompts by position, without end, all in memory.

    vocabulary: number of token ids. max_tokens: the longest prompt that leaves room for a
    response in the policy's context; `prompts.max_tokens` may lower it. tokenizer: text or
    conversation → token ids, for data without a column `prompt_ids`. Everything is read and checked
    here; PromptError says what is wrong.
    """

    def __init__(
        self,
        config: PromptsConfig,
        seed: int,
        vocabulary: int,
        max_tokens: int,
        tokenizer: Tokenize | None = None,
    ) -> None:
        self._config, self._seed = config, seed
        limit = min(max_tokens, config.max_tokens or max_tokens)
        source = PromptRows(config, vocabulary, limit, tokenizer)
        prompts = list(source)
        if not prompts:
            raise PromptError(f"{config.path}: holds no prompts{_dropped(source.counts)}")
        self.counts = source.counts
        self._token_P = np.concatenate(prompts)
        self._offset_n1 = offsets([len(ids) for ids in prompts])
        self._token_P.flags.writeable = False

    @property
    def rows(self) -> int:
        """n, the prompts of one epoch."""
        return len(self._offset_n1) - 1

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position of the endless stream, 0 or more."""
        if position < 0:
            raise IndexError(f"prompt position {position} is below 0")
        epoch, place = divmod(position, self.rows)
        row = place
        if self._config.shuffle:
            row = int(_permutation(self._seed, f"prompts/{epoch}", self.rows)[place])
        return Prompt(self._token_P[self._offset_n1[row] : self._offset_n1[row + 1]], row)


class StreamedPrompts:
    """Prompts by position of a set that memory does not hold; arguments as `PromptStream` has them.

    Rows are read on as positions are asked for, `prompts.buffer` at a time, and the last two
    buffers are kept: positions may come out of order by as much. One further back, or one of the
    next epoch, begins a new reading. How many rows there are is known once the end was seen.
    Shuffling is by keyed draw within each buffer.
    """

    def __init__(
        self,
        config: PromptsConfig,
        seed: int,
        vocabulary: int,
        max_tokens: int,
        tokenizer: Tokenize | None = None,
    ) -> None:
        self._config, self._seed = config, seed
        limit = min(max_tokens, config.max_tokens or max_tokens)
        self._source = PromptRows(config, vocabulary, limit, tokenizer)
        self.counts = self._source.counts
        self._rows: int | None = None
        self._begin()
        if not self._buffer(0):
            raise PromptError(f"{config.path}: holds no prompts{_dropped(self.counts)}")

    @property
    def rows(self) -> int:
        """n, the prompts of one epoch; reads to the end where that was not seen yet."""
        while self._rows is None:
            self._read_on()
        return self._rows

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position of the endless stream, 0 or more."""
        if position < 0:
            raise IndexError(f"prompt position {position} is below 0")
        epoch, size = 0, self._config.buffer
        while self._rows is None and position >= self._next * size:
            self._read_on()
        if self._rows is not None:
            epoch, position = divmod(position, self._rows)
        number, place = divmod(position, size)
        prompts = self._buffer(number)
        if self._config.shuffle:
            name = f"prompts/{epoch}/{number}"
            place = int(_permutation(self._seed, name, len(prompts))[place])
        return Prompt(prompts[place], number * size + place)

    def _buffer(self, number: int) -> list[np.ndarray]:
        """The prompts number·buffer … of an epoch; empty beyond its end."""
        if number < self._next and number not in self._kept:
            self._begin()
        while self._next <= number and not self._ended:
            self._read_on()
        return self._kept.get(number, [])

    def _begin(self) -> None:
        self._reading: Iterator[np.ndarray] = iter(self._source)
        self._kept: dict[int, list[np.ndarray]] = {}
        self._next, self._ended = 0, False  # buffer

    def _read_on(self) -> None:
        """Read the next buffer, and forget all but the last."""
        size = self._config.buffer
        prompts = list(itertools.islice(self._reading, size))
        self._ended = len(prompts) < size
        self._kept = {self._next - 1: self._kept.get(self._next - 1, []), self._next: prompts}
        self._next += 1
        if self._ended:
            self._rows = (self._next - 1) * size + len(prompts)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, name: str, count: int) -> np.ndarray:
    """The keyed permutation of so many rows (law 8)."""
    bits = np.random.Philox(key=stream_key(seed, name))
    return np.random.Generator(bits).permutation(count)


def _dropped(counts: RowCounts) -> str:
    return f": all {counts.rows} are over the length limit" if counts.dropped else ""
