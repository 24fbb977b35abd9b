"""The rows of a prompt source as token ids, one pass from its beginning."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from actors.adapters import adapt
from actors.encoding import encoded
from actors.row_limits import RowCounts, fit_prompt
from actors.tables import DataError, Row, dataset_rows, jsonl_rows, parquet_rows, token_ids
from configs.choices import PromptKind
from configs.schema import PromptsConfig

Tokenize = Callable[[Any], Sequence[int]]  # of a text or a conversation

IDS_COLUMN = "prompt_ids"


class PromptError(DataError):
    """Prompts that cannot be used, in one line that names file, row and reason."""


class PromptRows:
    """Prompts in the data's order, checked; each iteration reads anew.

    vocabulary: number of token ids. limit: the longest prompt allowed, in tokens. tokenizer: for
    data without a column `prompt_ids`. counts: the rows of the first reading, as far as it went.
    """

    def __init__(
        self, config: PromptsConfig, vocabulary: int, limit: int, tokenizer: Tokenize | None
    ) -> None:
        self.config, self.vocabulary, self.limit = config, vocabulary, limit
        self.tokenizer = tokenizer
        self.counts = RowCounts()
        self._read_before = 0  # rows that are counted

    def __iter__(self) -> Iterator[np.ndarray]:
        """Token ids of each prompt, int32 [P]. Raises PromptError."""
        config = self.config
        try:
            for number, row in enumerate(itertools.islice(self._rows(), config.count or None)):
                counts = RowCounts() if number < self._read_before else self.counts
                self._read_before = max(self._read_before, number + 1)
                counts.rows += 1
                ids = fit_prompt(
                    row.where, self._ids(row), self.limit, config.over_length, counts,
                    "prompts.over_length",
                )  # fmt: skip
                if ids is not None:
                    counts.keep(ids)
                    yield ids
        except DataError as error:
            raise PromptError(str(error)) from error

    def _rows(self) -> Iterator[Row]:
        config = self.config
        if config.source is PromptKind.bandit:
            return (Row(f"context {i}", {IDS_COLUMN: [i]}) for i in range(config.count))
        if config.source is PromptKind.jsonl:
            return jsonl_rows(config.path)
        if config.source is PromptKind.parquet:
            return parquet_rows(config.path)
        return dataset_rows(config.path, config.split, config.subset, config.streaming)

    def _ids(self, row: Row) -> np.ndarray:
        if row.values.get(IDS_COLUMN) is not None:
            return token_ids(row.values[IDS_COLUMN], IDS_COLUMN, row.where, self.vocabulary)
        column = self.config.column
        prompt = adapt(row, self.config.format, column).prompt
        if self.tokenizer is None:
            raise DataError(
                f"{row.where}: column '{column}' is text and the policy has no tokenizer; "
                f"give token ids in a column {IDS_COLUMN}"
            )
        ids = encoded(row.where, self.tokenizer, prompt)
        return token_ids(ids, f"tokenized '{column}'", row.where, self.vocabulary)
