"""Rows of JSONL, Parquet and `datasets` tables, each with where it stands, for error messages."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import one_line

TOKEN_LIMIT = 2**31  # token ids are int32
FILES = (".jsonl", ".json", ".parquet", ".arrow")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?")


class DataError(ValueError):
    """A data file or a row of it that cannot be used, in one line that says where and why."""


class Row(NamedTuple):
    """One row, and its place as a person would look it up: `data.jsonl: line 3`."""

    where: str
    values: dict[str, Any]


def jsonl_rows(path: str) -> Iterator[Row]:
    """Rows of a JSON Lines file (UTF-8), blank lines left out. Raises DataError, naming the line.

    Lines are counted from 1.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}: line {number}"
                    yield Row(where, _parse(line, where))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {brief(error)}") from error


def parquet_rows(path: str) -> Iterator[Row]:
    """Rows of a Parquet file. Raises DataError where it cannot be read. Rows count from 0."""
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(f"{path}: row {number}", values)
                    number += 1
    except Exception as error:  # e.g. OverflowError for a date after the year 9999
        raise DataError(f"{path}: cannot be read: {brief(error)}") from error


def dataset_rows(path: str, split: str, subset: str = "", streaming: bool = False) -> Iterator[Row]:
    """Rows of a Hugging Face data set: a saved or loadable directory, an Arrow file, else a name on
    the hub, of a commit or branch as NAME@REVISION.

    subset: of a data set that has several. streaming: read as it is asked for, not at once. Raises
    DataError where it cannot be loaded or has no such split. Rows count from 0.
    """
    rows = _load_dataset(path, split, subset, streaming)
    try:
        for number, values in enumerate(rows):
            yield Row(f"{path}: row {number}", dict(values))
    except Exception as error:  # as in `parquet_rows`
        raise DataError(f"{path}: cannot be read: {brief(error)}") from error


def table_rows(
    path: str, split: str = "train", subset: str = "", streaming: bool = False
) -> Iterator[Row]:
    """Rows of a JSONL or Parquet file by its ending, of an Arrow file, a directory or a name on the
    hub as `dataset_rows` has it."""
    suffix = Path(path).suffix
    if suffix == ".parquet":
        return parquet_rows(path)
    if suffix not in FILES and (os.path.isdir(path) or HUB_NAME.fullmatch(path)):
        return dataset_rows(path, split, subset, streaming)
    return dataset_rows(path, split) if suffix == ".arrow" else jsonl_rows(path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line; the file appears whole or not at all. OSError where it cannot."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with beside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def token_ids(value: Any, what: str, where: str, vocabulary: int | None = None) -> np.ndarray:
    """A non-empty list of token ids as int32 [n].

    what: the column, for the DataError that names it, `where` and the offending id.
    vocabulary: ids must be under it; None leaves that unchecked.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: {what} must be a list of token ids, found {_kind(value)}")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise DataError(f"{where}: {what} must hold whole numbers, found {_kind(token)}")
    if not value:
        raise DataError(f"{where}: {what} has no tokens")
    limit = TOKEN_LIMIT if vocabulary is None else vocabulary
    low, high = min(value), max(value)
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        found = f"{what} has token id {brief(bad, 40)}"
        raise DataError(f"{where}: {found}, outside the vocabulary of {limit}")
    return np.asarray(value, dtype=np.int32)


def require(row: Row, column: str) -> Any:
    """A row's value of a column; DataError naming the columns that there are, if it is missing."""
    value = row.values.get(column)
    if value is None and column in row.values:
        raise DataError(f"{row.where}: column '{column}' is null")
    if value is None:
        there = brief(", ".join(map(str, row.values))) or "none"
        raise DataError(f"{row.where}: no column '{column}', found: {there}")
    return value


def brief(error: object, limit: int = 300) -> str:
    """An error's text in one printable line of at most `limit` characters."""
    return one_line(str(error), limit) or type(error).__name__


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON: {brief(error)}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a JSON object, found {_kind(values)}")
    return values


def _load_dataset(path: str, split: str, subset: str, streaming: bool) -> Any:
    import datasets

    options: dict[str, Any] = {"name": subset or None, "split": split, "streaming": streaming}
    try:
        if path.endswith(".arrow"):
            return datasets.Dataset.from_file(path)
        if os.path.isdir(path):
            saved = {"state.json", "dataset_dict.json"} & set(os.listdir(path))
            if not saved:
                return datasets.load_dataset(path, **options)
            loaded = datasets.load_from_disk(path)  # mapped into memory, so never all in it
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
            raise FileNotFoundError("no such directory")
        name, _, revision = path.partition("@")
        return datasets.load_dataset(name, revision=revision or None, **options)
    except Exception as error:  # the hub's and the builders' errors share no base class
        problem = f"cannot be loaded with split={split}: {brief(error)}"
        raise DataError(f"{path}: {problem}") from error


def _kind(value: Any) -> str:
    """A value's type, and the value where it is short."""
    name = "null" if value is None else type(value).__name__
    text = repr(value)
    return f"{name} {text}" if value is not None and len(text) <= 40 else name
