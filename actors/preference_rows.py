"""One row of an offline data file, checked and typed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.adapters import adapt
from actors.encoding import TextEncoder, encoded
from actors.rollout import UNLABELLED
from actors.tables import DataError, Row, brief, require, token_ids
from configs.choices import DataFormat

PAIR = ("chosen", "rejected")
IDS = {"prompt_ids", "chosen_ids", "rejected_ids", "responses_ids"}
LOGP_SLACK = 1e-4  # nats over 0 that rounding may leave


@dataclass(frozen=True, eq=False)
class OfflineGroup:
    """The C responses to one prompt.

    prompt_ids: int32 [P]. responses: C arrays int32. rewards_C: float32, NaN where unknown.
    labels_C: int8, 1 preferred or good, 0 not, −1 unlabelled. logps: C float32 arrays in nats, one
    number per token under the policy and temperature that generated it, or None.
    """

    prompt_ids: np.ndarray
    responses: tuple[np.ndarray, ...]
    rewards_C: np.ndarray
    labels_C: np.ndarray
    logps: tuple[np.ndarray, ...] | None = None


class TiedError(DataError):
    """A row that prefers none of its two responses."""


def parse_group(
    row: Row, vocabulary: int | None = None, encoder: TextEncoder | None = None,
    form: DataFormat = DataFormat.auto,
) -> OfflineGroup:  # fmt: skip
    """The group that a row describes (see `actors.preferences`).

    encoder: for rows of text. Raises DataError, and TiedError where two responses are equally good.
    """
    if not IDS & set(row.values):
        return _encoded(row, vocabulary, encoder, form)
    prompt = token_ids(require(row, "prompt_ids"), "prompt_ids", row.where, vocabulary)
    pair = [row.values.get("chosen_ids"), row.values.get("rejected_ids")]
    many = row.values.get("responses_ids")
    if many is not None and pair != [None, None]:
        raise DataError(f"{row.where}: has both responses_ids and chosen_ids or rejected_ids")
    if many is not None:
        return _scored(row, prompt, many, vocabulary)
    if pair == [None, None]:
        raise DataError(
            f"{row.where}: no responses; give chosen_ids and rejected_ids, or responses_ids"
        )
    chosen, rejected = (
        token_ids(require(row, name), name, row.where, vocabulary)
        for name in ("chosen_ids", "rejected_ids")
    )
    if np.array_equal(chosen, rejected):
        equal = "chosen_ids and rejected_ids are equal, which prefers none"
        raise TiedError(f"{row.where}: {equal}")
    rewards = [_reward(row.values.get(f"{name}_reward"), row.where) for name in PAIR]
    return OfflineGroup(
        prompt, (chosen, rejected), np.array(rewards, dtype=np.float32),
        np.array([1, 0], dtype=np.int8),
    )  # fmt: skip


def _encoded(
    row: Row, vocabulary: int | None, encoder: TextEncoder | None, form: DataFormat
) -> OfflineGroup:
    """The group of a row of text."""
    example = adapt(row, form)
    if not example.responses:
        raise DataError(
            f"{row.where}: no responses; give response, chosen and rejected, or responses, or "
            "name another data.format"
        )
    if encoder is None:
        raise DataError(
            f"{row.where}: is text and the policy has no tokenizer; give token ids in columns "
            "prompt_ids, chosen_ids and rejected_ids, or responses_ids"
        )
    if example.tied:
        raise TiedError(f"{row.where}: its two responses are equally good, which prefers none")
    prompt = encoded(row.where, encoder, example.prompt)
    responses = [
        token_ids(encoded(row.where, encoder.response, text), "a response",
                  row.where, vocabulary)
        for text in example.responses
    ]  # fmt: skip
    return OfflineGroup(
        token_ids(prompt, "the tokenized prompt", row.where, vocabulary),
        tuple(responses),
        np.array([_reward(value, row.where) for value in example.rewards], dtype=np.float32),
        np.array([_label(value, row.where) for value in example.labels], dtype=np.int8),
    )


def _scored(row: Row, prompt: np.ndarray, many: Any, vocabulary: int | None) -> OfflineGroup:
    lists = _list(many, "responses_ids", row.where)
    if not lists:
        raise DataError(f"{row.where}: responses_ids is empty")
    responses = tuple(
        token_ids(ids, f"responses_ids[{i}]", row.where, vocabulary) for i, ids in enumerate(lists)
    )
    rewards = [_reward(value, row.where) for value in _column(row, "rewards", len(lists))]
    labels = [_label(value, row.where) for value in _column(row, "labels", len(lists))]
    logps = None
    if row.values.get("logps") is not None:
        logps = tuple(
            _logps(value, len(ids), row.where)
            for value, ids in zip(_column(row, "logps", len(lists)), responses, strict=True)
        )
    return OfflineGroup(
        prompt,
        responses,
        np.array(rewards, dtype=np.float32),
        np.array(labels, dtype=np.int8),
        logps,
    )


def _column(row: Row, name: str, members: int) -> Sequence[Any]:
    """A list with one entry for each response; nulls where the column is absent."""
    value = row.values.get(name)
    if value is None:
        return [None] * members
    if len(_list(value, name, row.where)) != members:
        raise DataError(f"{row.where}: {len(value)} {name} for {members} responses")
    return _list(value, name, row.where)


def _list(value: Any, name: str, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: {name} must be a list, found {type(value).__name__}")
    return value


def _reward(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    number = _finite(value)
    if number is None:
        found = f"reward {brief(repr(value), 40)} is not a finite number"
        raise DataError(f"{where}: {found}; null is an unknown one")
    return number


def _label(value: Any, where: str) -> int:
    if value is None:
        return UNLABELLED
    if not isinstance(value, int) or value not in (0, 1, UNLABELLED):
        raise DataError(f"{where}: label {brief(repr(value), 40)} is none of 1, 0, -1 and null")
    return int(value)


def _logps(value: Any, tokens: int, where: str) -> np.ndarray:
    """Log-probabilities of one response, float32 [tokens], nats; NaN throughout for null."""
    if value is None:
        return np.full(tokens, np.nan, dtype=np.float32)
    numbers = [_finite(number) for number in _list(value, "logps", where)]
    if len(numbers) != tokens:
        raise DataError(f"{where}: {len(numbers)} logps for a response of {tokens} tokens")
    if any(number is None or number > LOGP_SLACK for number in numbers):
        raise DataError(f"{where}: logps must be finite numbers of at most 0 (nats)")
    return np.array(numbers, dtype=np.float32)


def _finite(value: Any) -> float | None:
    """The number that a value is in float32, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= float(np.finfo(np.float32).max) else None
