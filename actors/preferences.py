"""Offline rollouts: groups of scored, ranked or labelled responses from a file.

A row holds `prompt_ids`, and either `chosen_ids` and `rejected_ids` (a pair, C = 2; perhaps with
`chosen_reward` and `rejected_reward`), or `responses_ids` (C lists) with `rewards`, `labels` and
`logps` as far as they are known: a null is an unknown reward, label or list of log-probabilities.
Unknown stays unknown (NaN, −1), never 0. Rows of text are as `actors.adapters` says.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from actors.encoding import TextEncoder
from actors.preference_rows import OfflineGroup, TiedError, parse_group
from actors.rollout import OFFLINE_STEP, UNLABELLED, VALID, Rollouts, offsets
from actors.row_limits import RowCounts, fit_group
from actors.tables import DataError, Row, brief, table_rows
from configs.schema import DataConfig

__all__ = [
    "OfflineGroup",
    "PreferenceError",
    "PreferenceRows",
    "from_rollouts",
    "read",
    "to_rollouts",
    "write_parquet",
]


class PreferenceError(DataError):
    """Offline data that cannot be used, in one line that names file, row and reason."""


class PreferenceRows:
    """The groups of a JSONL or Parquet file (by its ending), an Arrow file or a data set, checked;
    each iteration reads anew.

    members: C that every row must have; None: as many as the first row has. vocabulary: number of
    token ids. max_prompt, max_response: the longest allowed, in tokens. None leaves a limit out.
    encoder: for rows of text. how: format, subset, split and what becomes of rows over a limit.
    counts: takes the account of the rows that the first reading came to. Rows that prefer none of
    two responses are left out.
    """

    def __init__(
        self,
        path: str,
        members: int | None = None,
        vocabulary: int | None = None,
        max_prompt: int | None = None,
        max_response: int | None = None,
        encoder: TextEncoder | None = None,
        how: DataConfig | None = None,
        counts: RowCounts | None = None,
    ) -> None:
        self.path, self.members, self.how = path, members, how or DataConfig()
        self.counts = counts if counts is not None else RowCounts()
        self._vocabulary, self._encoder = vocabulary, encoder
        self._limits = max_prompt, max_response
        self._read_before = 0  # rows that are counted

    def __iter__(self) -> Iterator[OfflineGroup]:
        """Raises PreferenceError naming file, line or row, and reason; also where none is left."""
        kept, tied = 0, ""
        rows = table_rows(self.path, self.how.split, self.how.subset, self.how.streaming)
        try:
            for number, row in enumerate(rows):
                counts = RowCounts() if number < self._read_before else self.counts
                self._read_before = max(self._read_before, number + 1)
                counts.rows += 1
                try:
                    group = self._group(row, counts)
                except TiedError as error:
                    counts.tied, tied = counts.tied + 1, tied or str(error)
                    continue
                if group is not None:
                    kept += 1
                    yield group
        except DataError as error:
            raise PreferenceError(str(error)) from error
        if not kept:
            raise PreferenceError(tied or f"{self.path}: {_nothing(self.counts)}")

    def _group(self, row: Row, counts: RowCounts) -> OfflineGroup | None:
        """The row's group; None where it is over a limit. Raises DataError, TiedError."""
        parsed = parse_group(row, self._vocabulary, self._encoder, self.how.format)
        group = fit_group(row.where, parsed, *self._limits, self.how.over_length, counts)
        if group is None:
            return None
        counts.keep(group.prompt_ids)
        self.members = self.members or len(group.responses)
        if len(group.responses) != self.members:
            raise DataError(
                f"{row.where}: {len(group.responses)} responses where every row needs "
                f"{self.members} (rollout.responses_per_prompt)"
            )
        return group


def read(
    path: str,
    members: int | None = None,
    vocabulary: int | None = None,
    max_prompt: int | None = None,
    max_response: int | None = None,
    encoder: TextEncoder | None = None,
    how: DataConfig | None = None,
    counts: RowCounts | None = None,
) -> list[OfflineGroup]:
    """All groups; arguments and errors as `PreferenceRows` has them."""
    limits = max_prompt, max_response
    return list(PreferenceRows(path, members, vocabulary, *limits, encoder, how, counts))


def _nothing(counts: RowCounts) -> str:
    return f"all {counts.rows} rows are over a length limit" if counts.rows else "holds no rows"


def write_parquet(path: str, groups: Sequence[OfflineGroup]) -> None:
    """Store groups so that `read` gives them back; the file appears whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    ints = pyarrow.list_(pyarrow.int32())
    floats = pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema({
        "prompt_ids": ints,
        "responses_ids": pyarrow.list_(ints),
        "rewards": floats,
        "labels": pyarrow.list_(pyarrow.int8()),
        "logps": pyarrow.list_(floats),
    })  # fmt: skip
    table = pyarrow.Table.from_pylist([_as_row(group) for group in groups], schema=schema)
    beside = f"{path}.{os.getpid()}.part"
    try:
        pyarrow.parquet.write_table(table, beside)
        os.replace(beside, path)
    except OSError as error:
        raise PreferenceError(f"{path}: cannot be written: {brief(error)}") from error
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def from_rollouts(block: Rollouts) -> list[OfflineGroup]:
    """The groups of a block, e.g. one sampled from π_ref. ValueError where a member failed."""
    if block.failures or (block.status_N != VALID).any():
        raise ValueError("a block with failed rollouts cannot become offline data")
    groups = []
    for g in range(block.groups):
        members = range(g * block.members, (g + 1) * block.members)
        span = slice(members.start, members.stop)
        cuts = [slice(*block.offset_N1[n : n + 2]) for n in members]
        logps = tuple(block.logp_K[cut].copy() for cut in cuts)
        groups.append(
            OfflineGroup(
                prompt_ids=block.prompt(g).copy(),
                responses=tuple(block.token_K[cut].copy() for cut in cuts),
                rewards_C=block.reward_N[span].copy(),
                labels_C=block.label_N[span].copy(),
                logps=None if all(np.isnan(logp).all() for logp in logps) else logps,
            )
        )
    return groups


def to_rollouts(
    groups: Sequence[OfflineGroup],
    positions: Sequence[int],
    incarnations: Sequence[int],
    rows: Sequence[int],
    temperature: float = 1.0,
) -> Rollouts:
    """A block of offline rollouts: step −1, lineage 0, NaN log-probabilities where unknown.

    positions, incarnations: the ids of the groups in this run. rows: their stable numbers in the
    file, which reuse accumulates on. temperature: that the responses were sampled at.
    """
    if not groups or len({len(group.responses) for group in groups}) > 1:
        raise ValueError("offline groups must be at least one and all of one size")
    tokens = [ids for group in groups for ids in group.responses]
    count, total = len(tokens), sum(map(len, tokens))
    return Rollouts(
        members=len(groups[0].responses),
        position_G=np.asarray(positions, dtype=np.int64),
        incarnation_G=np.asarray(incarnations, dtype=np.int32),
        row_G=np.asarray(rows, dtype=np.int64),
        prompt_offset_G1=offsets([len(group.prompt_ids) for group in groups]),
        prompt_P=np.concatenate([group.prompt_ids for group in groups]).astype(np.int32),
        offset_N1=offsets([len(ids) for ids in tokens]),
        token_K=np.concatenate(tokens).astype(np.int32),
        logp_K=np.concatenate([_logps(group) for group in groups]).astype(np.float32),
        lineage_K=np.zeros(total, dtype=np.int16),
        step_K=np.full(total, OFFLINE_STEP, dtype=np.int32),
        reward_N=np.concatenate([group.rewards_C for group in groups]).astype(np.float32),
        status_N=np.full(count, VALID, dtype=np.uint8),
        truncated_N=np.zeros(count, dtype=bool),
        label_N=np.concatenate([group.labels_C for group in groups]).astype(np.int8),
        scorer_N=np.zeros(count, dtype=np.uint8),
        temperature=temperature,
    )


def _logps(group: OfflineGroup) -> np.ndarray:
    if group.logps is not None:
        return np.concatenate(group.logps)
    return np.full(sum(map(len, group.responses)), np.nan, dtype=np.float32)


def _as_row(group: OfflineGroup) -> dict[str, Any]:
    return {
        "prompt_ids": group.prompt_ids.tolist(),
        "responses_ids": [ids.tolist() for ids in group.responses],
        "rewards": [None if math.isnan(r) else r for r in group.rewards_C.tolist()],
        "labels": [None if label == UNLABELLED else label for label in group.labels_C.tolist()],
        "logps": None if group.logps is None else [_known(logp) for logp in group.logps],
    }


def _known(logp: np.ndarray) -> list[float] | None:
    return None if np.isnan(logp).any() else logp.tolist()
