"""Prompt streams: a position is the checkpoint, and bad data is named by file and row."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.prompts import Prompt, PromptError, PromptStream
from configs.choices import PromptKind
from configs.schema import PromptsConfig


def bandit(count=10, shuffle=False, seed=0, **limits):
    config = PromptsConfig(count=count, shuffle=shuffle)
    return PromptStream(config, seed, **{"vocabulary": 100, "max_tokens": 6, **limits})


def from_file(path, source=PromptKind.jsonl, tokenizer=None, **fields):
    config = PromptsConfig(source=source, path=str(path), **{"count": 0, **fields})
    return PromptStream(config, 0, vocabulary=100, max_tokens=6, tokenizer=tokenizer)


def jsonl(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def letters(text):
    return [ord(letter) - ord("a") for letter in text]


# --- positions -------------------------------------------------------------------------------


def test_bandit_prompt_i_is_the_single_token_i():
    stream = bandit(count=3)
    assert [stream[p].ids.tolist() for p in range(7)] == [[0], [1], [2], [0], [1], [2], [0]]
    assert [stream[p].row for p in range(4)] == [0, 1, 2, 0]
    assert isinstance(stream[0], Prompt) and stream[0].ids.dtype == np.int32


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**31), st.booleans())
def test_a_position_gives_the_same_prompt_whatever_was_read_before(position, seed, shuffle):
    read, fresh = bandit(shuffle=shuffle, seed=seed), bandit(shuffle=shuffle, seed=seed)
    for earlier in range(max(0, position - 60), position, 7):
        read[earlier]
    assert read[position].row == fresh[position].row


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own():
    stream = bandit(count=50, shuffle=True)
    epochs = [[stream[e * 50 + p].row for p in range(50)] for e in range(6)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_order_is_keyed_by_the_seed():
    orders = {tuple(bandit(30, True, seed)[p].row for p in range(30)) for seed in range(5)}
    assert len(orders) == 5


def test_a_stream_travels_to_another_process():
    stream = bandit(shuffle=True)
    copied = pickle.loads(pickle.dumps(stream))
    assert [copied[p].row for p in range(30)] == [stream[p].row for p in range(30)]


def test_positions_start_at_zero():
    with pytest.raises(IndexError, match="-1"):
        bandit()[-1]


# --- sources ---------------------------------------------------------------------------------


def test_jsonl_takes_token_ids_as_they_are_and_skips_blank_lines(tmp_path):
    stream = from_file(jsonl(tmp_path, {"prompt_ids": [1, 2]}, "", {"prompt_ids": [3]}))
    assert [stream[p].ids.tolist() for p in range(3)] == [[1, 2], [3], [1, 2]]


def test_text_goes_through_the_tokenizer(tmp_path):
    path = jsonl(tmp_path, {"question": "abc"})
    assert from_file(path, tokenizer=letters, column="question")[0].ids.tolist() == [0, 1, 2]


def test_count_limits_the_rows_read(tmp_path):
    path = jsonl(tmp_path, {"prompt_ids": [1]}, {"prompt_ids": [2]}, "never read")
    assert from_file(path, count=2).rows == 2


def test_parquet_rows_equal_those_of_jsonl(tmp_path):
    rows = [{"prompt_ids": [5, 6]}, {"prompt_ids": [7]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    stream = from_file(tmp_path / "p.parquet", PromptKind.parquet)
    assert [stream[p].ids.tolist() for p in range(2)] == [[5, 6], [7]]


def test_a_saved_dataset_and_one_of_its_splits_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": "ab"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": one}).save_to_disk(tmp_path / "many")
    source = PromptKind.dataset
    assert from_file(tmp_path / "one", source, letters)[0].ids.tolist() == [0, 1]
    assert from_file(tmp_path / "many", source, letters, split="test")[0].ids.tolist() == [0, 1]
    with pytest.raises(PromptError, match="split=train"):
        from_file(tmp_path / "many", source, letters)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("{", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("[1]", "must be a JSON object"),
        ({"text": "a"}, "no column 'prompt', found: text"),
        ({"prompt": None}, "column 'prompt' is null"),
        ({"prompt": 3}, "must be text"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "é"}, "token id 136, outside the vocabulary of 100"),
        ({"prompt": "abcdefg"}, "prompt of 7 tokens is over the limit of 6"),
        ({"prompt_ids": [1, 100]}, "token id 100"),
        ({"prompt_ids": [-1]}, "token id -1"),
        ({"prompt_ids": [2**70]}, "outside the vocabulary"),
        ({"prompt_ids": [1.0]}, "whole numbers"),
        ({"prompt_ids": [True]}, "whole numbers"),
        ({"prompt_ids": "12"}, "list of token ids"),
        ({"prompt_ids": []}, "no tokens"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, bad, reason):
    path = jsonl(tmp_path, {"prompt_ids": [1]}, bad)
    with pytest.raises(PromptError) as caught:
        from_file(path, tokenizer=letters)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path):
    rows = [{"prompt_ids": [1]}, {"prompt_ids": [100]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match="p.parquet: row 1: .* token id 100"):
        from_file(tmp_path / "p.parquet", PromptKind.parquet)


def test_text_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(PromptError, match="no tokenizer; give token ids in a column prompt_ids"):
        from_file(jsonl(tmp_path, {"prompt": "a"}))


def refuses(text):
    raise KeyError("no such letter")


def test_a_tokenizer_that_raises_is_named_with_its_row(tmp_path):
    with pytest.raises(PromptError, match="line 1: cannot be tokenized: 'no such letter'"):
        from_file(jsonl(tmp_path, {"prompt": "a"}), tokenizer=refuses)


@pytest.mark.parametrize("source", [PromptKind.jsonl, PromptKind.parquet, PromptKind.dataset])
def test_a_missing_file_is_one_clear_line(tmp_path, source):
    with pytest.raises(PromptError, match="nowhere") as caught:
        from_file(tmp_path / "nowhere", source)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", [PromptKind.jsonl, PromptKind.parquet])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad", b"PAR1"])
def test_an_empty_or_unreadable_file_is_one_clear_line(tmp_path, source, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        from_file(path, source)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_directory_is_not_a_file(tmp_path):
    for source in (PromptKind.jsonl, PromptKind.parquet):
        with pytest.raises(PromptError):
            from_file(tmp_path, source)


def test_the_setting_lowers_the_limit_but_never_raises_it(tmp_path):
    path = jsonl(tmp_path, {"prompt_ids": [1, 2, 3]})
    with pytest.raises(PromptError, match="limit of 2"):
        from_file(path, max_tokens=2)
    with pytest.raises(PromptError, match="limit of 6"):
        from_file(jsonl(tmp_path, {"prompt_ids": [1] * 7}), max_tokens=50)


def test_bandit_contexts_outside_the_vocabulary_are_refused():
    with pytest.raises(PromptError, match="context 5"):
        bandit(count=10, vocabulary=5)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_prompts_or_one_clear_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(content)
    try:
        from_file(path, tokenizer=letters)
    except PromptError as error:
        assert len(str(error).splitlines()) == 1
