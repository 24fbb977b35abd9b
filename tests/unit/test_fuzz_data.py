"""Whatever a data file holds: prompts or groups to use, or one line: file, row and reason."""

import io
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example
from hypothesis import strategies as st

from actors.preferences import OfflineGroup, PreferenceError, read, to_rollouts
from actors.prompts import PromptError, PromptStream
from actors.tables import DataError
from configs.choices import PromptKind
from configs.schema import PromptsConfig
from tests.fuzz import (
    DEEP,
    NUMBERS,
    TEXT,
    VALUES,
    assert_one_line,
    fuzz,
    json_text,
    mutated,
    mutated_tree,
    trial,
)

VOCABULARY, LONGEST = 100, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def letters(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def prompts_work(path: Path, source: PromptKind) -> None:
    """The stream gives prompts within its limits, or a PromptError of one line."""
    config = PromptsConfig(source=source, path=str(path), count=0)
    try:
        stream = PromptStream(config, 0, VOCABULARY, LONGEST, letters)
    except PromptError as error:
        assert_names_the_file(error, path)
        return
    for position in range(stream.rows):
        ids = stream[position].ids
        assert ids.dtype == np.int32 and 0 < len(ids) <= LONGEST
        assert ids.min() >= 0 and ids.max() < VOCABULARY


def preferences_work(path: Path) -> None:
    """The groups are typed and can be served, or a PreferenceError of one line."""
    try:
        groups = read(str(path), None, VOCABULARY, LONGEST, LONGEST)
    except PreferenceError as error:
        assert_names_the_file(error, path)
        return
    assert all(map(is_whole, groups))
    block = to_rollouts(groups, range(len(groups)), [0] * len(groups), range(len(groups)))
    assert block.groups == len(groups) and len(block.token_K) == len(block.logp_K)


def is_whole(group: OfflineGroup) -> bool:
    known = group.logps or ()
    return (
        all(ids.min() >= 0 and ids.max() < VOCABULARY for ids in group.responses)
        and len(group.rewards_C) == len(group.labels_C) == len(group.responses)
        and not np.isinf(group.rewards_C).any()
        and set(group.labels_C.tolist()) <= {-1, 0, 1}
        and all(len(a) == len(b) for a, b in zip(known, group.responses))
        and not any(np.isinf(logp).any() for logp in known)
    )


def assert_names_the_file(error: DataError, path: Path) -> None:
    assert_one_line(str(error), 600)
    assert str(error).startswith(f"{path}: ")


# --- rows ------------------------------------------------------------------------------------

PROMPTS = [{"prompt_ids": [0, 99]}, {"prompt": "abc", "x": 1}]
PAIR = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
SCORED = {"prompt_ids": [5], "responses_ids": [[3, 4], [5]], "rewards": [0.5, None],
          "labels": [1, 0], "logps": [[-1.0, -2.0], None]}  # fmt: skip
GROUPS = [PAIR, SCORED, {"prompt_ids": [1], "responses_ids": [[1], [2]], "labels": [0, -1]}]
HOSTILE = st.integers(-1, VOCABULARY) | NUMBERS | st.lists(NUMBERS, max_size=4) | VALUES


@st.composite
def lines(draw: Callable[..., Any], good: list[dict[str, Any]]) -> bytes:
    """Good rows, then one that is changed somewhere, made up, deep or no JSON at all."""
    row = st.sampled_from(good).flatmap(lambda tree: mutated_tree(tree, HOSTILE)).map(json_text)
    keys = st.dictionaries(st.sampled_from(sorted(good[0])) | TEXT, HOSTILE, max_size=3)
    deep = st.builds('{{"prompt_ids": [1], "{1}": {0}}}'.format, DEEP, st.sampled_from(
        ["prompt_ids", "prompt", "responses_ids", "chosen_ids"]))  # fmt: skip
    odd = st.one_of(keys.map(json_text), keys.map(json_text), deep, HOSTILE.map(json_text), TEXT)
    written = [json_text(row) for row in draw(st.lists(st.sampled_from(good), max_size=2))]
    written.append(draw(odd if draw(st.integers(0, 3)) == 0 else row))
    ending = draw(st.sampled_from(["\n", "\n", "\n", "\r\n", "\n\n", "\r", "\ufeff\n"]))
    return ending.join(written).encode("utf-8", "surrogatepass")


@fuzz(200, content=st.binary(max_size=80))
def test_any_bytes_are_data_or_one_clear_line(folder: Path, content: bytes) -> None:
    path = folder / "bytes.jsonl"
    path.write_bytes(content)
    with trial("data: JSONL prompts"):
        prompts_work(path, PromptKind.jsonl)
    with trial("data: JSONL preferences"):
        preferences_work(path)


@fuzz(250, content=lines(PROMPTS))
@example(content=b'{"\\ud800": 1}')  # a column that no terminal shows
def test_any_jsonl_rows_are_prompts_or_one_clear_line(folder: Path, content: bytes) -> None:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    with trial("data: JSONL prompts"):
        prompts_work(path, PromptKind.jsonl)


@fuzz(250, content=lines(GROUPS))
def test_any_jsonl_rows_are_groups_or_one_clear_line(folder: Path, content: bytes) -> None:
    path = folder / "groups.jsonl"
    path.write_bytes(content)
    with trial("data: JSONL preferences"):
        preferences_work(path)


# --- Parquet ---------------------------------------------------------------------------------

CELLS = st.one_of(
    st.lists(st.integers(-1, 120), max_size=5),
    st.lists(st.lists(st.integers(0, 99), max_size=3), max_size=3),
    st.lists(st.floats(), max_size=3),
    st.floats(),
    st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=4),
    st.datetimes(),
    st.timedeltas(timedelta(days=-9999), timedelta(days=9999)),
    st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-9, max_value=9),
    st.booleans(),
    st.text(max_size=5),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 9), max_size=2),
)
COLUMNS = ["prompt_ids", "prompt", "chosen_ids", "rejected_ids", "responses_ids", "rewards",
           "labels", "logps"]  # fmt: skip
ODD_TYPES = [pyarrow.date64(), pyarrow.timestamp("s"), pyarrow.timestamp("ns"),
             pyarrow.time64("us"), pyarrow.int64(), pyarrow.duration("s")]  # fmt: skip


@st.composite
def tables(draw: Any) -> pyarrow.Table:
    """Columns that are looked for, each of one type or another, nulls among its cells."""
    count = draw(st.integers(0, 3))
    arrays, names = [], draw(st.lists(st.sampled_from(COLUMNS), max_size=5))
    for _ in names:
        if draw(st.integers(0, 4)) == 0:
            raw = np.array([draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(count)], np.int64)
            arrays.append(pyarrow.array(raw).view(draw(st.sampled_from(ODD_TYPES))))
            continue
        value = draw(CELLS)
        cells = [value if draw(st.integers(0, 3)) else None for _ in range(count)]
        arrays.append(pyarrow.array(cells))
    return pyarrow.Table.from_arrays(arrays, names=names)


def in_parquet(table: pyarrow.Table) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


@fuzz(200, table=tables())
@example(table=pyarrow.table({"x": np.array([2**62]).view("datetime64[ms]")}))  # after year 9999
def test_any_parquet_columns_are_data_or_one_clear_line(folder: Path, table: pyarrow.Table) -> None:
    path = folder / "columns.parquet"
    try:
        path.write_bytes(in_parquet(table))
    except (pyarrow.ArrowException, ValueError):
        return  # a type that Parquet does not have
    with trial("data: Parquet prompts"):
        prompts_work(path, PromptKind.parquet)
    with trial("data: Parquet preferences"):
        preferences_work(path)


PARQUET = in_parquet(pyarrow.Table.from_pylist([SCORED] * 3))


@fuzz(300, content=mutated(PARQUET) | st.binary(max_size=60).map(lambda b: b"PAR1" + b + b"PAR1"))
def test_a_damaged_parquet_file_is_data_or_one_clear_line(folder: Path, content: bytes) -> None:
    path = folder / "damaged.parquet"
    path.write_bytes(content)
    with trial("data: Parquet prompts"):
        prompts_work(path, PromptKind.parquet)
    with trial("data: Parquet preferences"):
        preferences_work(path)


@fuzz(150, content=mutated("\n".join(map(json_text, GROUPS)).encode()))
def test_a_damaged_jsonl_file_is_data_or_one_clear_line(folder: Path, content: bytes) -> None:
    path = folder / "damaged.jsonl"
    path.write_bytes(content)
    with trial("data: JSONL prompts"):
        prompts_work(path, PromptKind.jsonl)
    with trial("data: JSONL preferences"):
        preferences_work(path)
