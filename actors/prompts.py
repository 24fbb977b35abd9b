"""The endless, resumable stream of prompts: a position is all that a checkpoint keeps.

    stream = open_prompts(config.prompts, config.seed, vocabulary=100, max_tokens=6)
    stream[position].ids

Position p is row p mod n of epoch p // n, in the data's order, or in an order drawn anew for each
epoch from (seed, epoch) alone. So any actor, and any resumed run, finds the same prompt there.
Rows dropped for their length have no position.
"""

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.buffered import Buffered
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

    Rows are read on as positions are asked for, `prompts.buffer` at a time (`actors.buffered`).
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
        limit = min(max_tokens, config.max_tokens or max_tokens)
        source = PromptRows(config, vocabulary, limit, tokenizer)
        self.counts = source.counts

        def order(epoch: int, number: int, count: int) -> np.ndarray:
            return _permutation(seed, f"prompts/{epoch}/{number}", count)

        self._buffered = Buffered(source, config.buffer, order if config.shuffle else None)
        if self._buffered.empty:
            raise PromptError(f"{config.path}: holds no prompts{_dropped(self.counts)}")

    @property
    def rows(self) -> int:
        """n, the prompts of one epoch; reads to the end where that was not seen yet."""
        return self._buffered.items

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position of the endless stream, 0 or more."""
        row, ids = self._buffered[position]
        return Prompt(ids, row)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, name: str, count: int) -> np.ndarray:
    """The keyed permutation of so many rows (law 8)."""
    bits = np.random.Philox(key=stream_key(seed, name))
    return np.random.Generator(bits).permutation(count)


def _dropped(counts: RowCounts) -> str:
    return f": all {counts.rows} are over the length limit" if counts.dropped else ""
