"""The endless, resumable stream of prompts: a position is all that a checkpoint keeps.

    stream = PromptStream(config.prompts, config.seed, vocabulary=100, max_tokens=6)
    stream[position].ids

Position p is row p mod n of epoch p // n, in the data's order, or in an order drawn anew for each
epoch from (seed, epoch) alone. So any actor, and any resumed run, finds the same prompt there.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actors.randomness import stream_key
from actors.rollout import offsets
from actors.tables import (
    DataError,
    Row,
    brief,
    dataset_rows,
    jsonl_rows,
    parquet_rows,
    require,
    token_ids,
)
from configs.choices import PromptKind
from configs.schema import PromptsConfig

Tokenize = Callable[[str], Sequence[int]]

IDS_COLUMN = "prompt_ids"
KEPT_EPOCHS = 4  # orders kept in memory


class PromptError(DataError):
    """Prompts that cannot be used, in one line that names file, row and reason."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt. ids: int32 token ids [P]. row: its stable number in the data set, from 0."""

    ids: np.ndarray
    row: int


class PromptStream:
    """Prompts by position, without end.

    vocabulary: number of token ids. max_tokens: the longest prompt that leaves room for a
    response in the policy's context; `prompts.max_tokens` may lower it. tokenizer: text → token
    ids, for data without a column `prompt_ids`. Everything is read and checked here; PromptError
    says what is wrong.
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
        self._vocabulary, self._tokenizer = vocabulary, tokenizer
        self._limit = min(max_tokens, config.max_tokens or max_tokens)
        try:
            prompts = list(self._read())
        except DataError as error:
            raise PromptError(str(error)) from error
        if not prompts:
            raise PromptError(f"{config.path}: holds no prompts")
        self._token_P = np.concatenate(prompts)
        self._offset_n1 = offsets([len(ids) for ids in prompts])
        self._token_P.flags.writeable = False
        self._orders: dict[int, np.ndarray] = {}  # of the epochs last asked for

    @property
    def rows(self) -> int:
        """n, the prompts of one epoch."""
        return len(self._offset_n1) - 1

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position ≥ 0, whatever was asked for before."""
        if position < 0:
            raise IndexError(f"prompt positions start at 0, asked for {position}")
        epoch, place = divmod(position, self.rows)
        row = int(self._order(epoch)[place]) if self._config.shuffle else place
        return Prompt(self._token_P[self._offset_n1[row] : self._offset_n1[row + 1]], row)

    def _order(self, epoch: int) -> np.ndarray:
        """The keyed permutation of one epoch's rows (law 8)."""
        if epoch not in self._orders:
            if len(self._orders) >= KEPT_EPOCHS:
                self._orders.clear()
            bits = np.random.Philox(key=stream_key(self._seed, f"prompts/{epoch}"))
            self._orders[epoch] = np.random.Generator(bits).permutation(self.rows)
        return self._orders[epoch]

    def _read(self) -> Iterator[np.ndarray]:
        config = self._config
        rows: Iterator[Row]
        if config.source is PromptKind.bandit:
            rows = (Row(f"context {i}", {IDS_COLUMN: [i]}) for i in range(config.count))
        else:
            rows = self._rows_of_file()
        for row in itertools.islice(rows, config.count or None):
            ids = self._ids(row)
            if len(ids) > self._limit:
                raise PromptError(
                    f"{row.where}: prompt of {len(ids)} tokens is over the limit of {self._limit}"
                )
            yield ids

    def _rows_of_file(self) -> Iterator[Row]:
        config = self._config
        if config.source is PromptKind.jsonl:
            return jsonl_rows(config.path)
        if config.source is PromptKind.parquet:
            return parquet_rows(config.path)
        return dataset_rows(config.path, config.split)

    def _ids(self, row: Row) -> np.ndarray:
        if row.values.get(IDS_COLUMN) is not None:
            return token_ids(row.values[IDS_COLUMN], IDS_COLUMN, row.where, self._vocabulary)
        column = self._config.column
        text = require(row, column)
        if not isinstance(text, str):
            raise PromptError(f"{row.where}: column '{column}' must be text")
        if self._tokenizer is None:
            raise PromptError(
                f"{row.where}: column '{column}' is text and the policy has no tokenizer; "
                f"give token ids in a column {IDS_COLUMN}"
            )
        try:
            ids = [int(token) for token in self._tokenizer(text)]
        except Exception as error:  # whatever a user's tokenizer raises
            raise PromptError(f"{row.where}: cannot be tokenized: {brief(error)}") from error
        return token_ids(ids, f"tokenized '{column}'", row.where, self._vocabulary)
