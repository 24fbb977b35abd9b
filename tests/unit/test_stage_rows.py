"""Rows and models of SFT and reward models: what is learned from, dropped and refused."""

import json
from pathlib import Path

import pytest

from actors.tables import DataError
from configs.schema import Config
from learner.stages.plan import open_stage
from learner.stages.reward_model import RewardModel
from learner.stages.sft import Sft
from tests.stages import (
    END,
    PAD,
    config_of,
    model_directory,
    preference_rows,
    sft_rows,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return model_directory(tmp_path_factory.mktemp("base"))


def test_token_ids_are_taken_as_they_are_and_end_once(base, tmp_path):
    rows = [
        {"prompt_ids": [3, 4], "response_ids": [5, END]},
        {"prompt_ids": [4], "response_ids": []},
        {"prompt": "a", "response": ""},
    ]
    stage = Sft(config_of("sft", base, write_rows(tmp_path / "r.jsonl", rows), "sft.held_out=0"))
    assert [r.tolist() for r in stage._responses] == [[5, END], [END], [END]]


def test_sft_learns_from_the_columns_of_public_sets(base, tmp_path):
    """UltraChat's conversations, AlpacaFarm's instructions: prompts as the encoder has them."""
    turns = ["a b", "c", "d e", "f g"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": text} for r, text in zip(roles, turns)]
    rows = [
        {"messages": messages, "prompt_id": "x"},
        {"instruction": "a", "input": "b", "output": "c d"},
        {"prompt": messages[:1], "response": "c"},
        {"prompt": "a b", "response": "c"},
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    stage = Sft(config_of("sft", base, path, "sft.held_out=0"))
    encoder = stage.source.encoder
    asked = [messages[:3], [{"role": "user", "content": "a\nb"}], messages[:1], "a b"]
    assert [p.tolist() for p in stage._prompts] == [encoder(prompt) for prompt in asked]
    answers = ["f g", "c d", "c", "c"]
    assert [r.tolist() for r in stage._responses] == [encoder.response(text) for text in answers]
    with pytest.raises(DataError, match="no column 'prompt'"):
        Sft(config_of("sft", base, path, "sft.format=text"))


def test_sft_reads_a_subset_and_split_of_a_data_set(base, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"instruction": "a", "input": "", "output": "b"}] * 3)
    datasets.DatasetDict({"sft": rows, "train": rows.select([0])}).save_to_disk(str(tmp_path / "d"))
    settings = ("sft.held_out=0", "sft.split=sft", "sft.format=alpaca")
    assert Sft(config_of("sft", base, str(tmp_path / "d"), *settings)).rows == 3


def test_rows_that_are_too_long_are_dropped_and_counted(base, tmp_path):
    rows = [{"prompt": "a", "response": " ".join("b" * n)} for n in (2, 22, 23, 30)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    at_context = Sft(config_of("sft", base, path, "sft.held_out=0"))
    assert at_context.dropped == {"too_long": 2} and at_context.rows == 4
    short = Sft(config_of("sft", base, path, "sft.held_out=0", "sft.max_tokens=4"))
    assert short.dropped == {"too_long": 3} and short.length_n.tolist() == [4]


def test_rows_of_equal_preference_are_dropped_and_counted(base, tmp_path):
    three = {"prompt_ids": [3], "responses_ids": [[4], [5, 5], [6]]}
    rows = [
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]},
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [4]},
        {**three, "rewards": [1.0, 1.0, 1.0]},
        {**three, "rewards": [1.0, 2.0, 1.0]},
        {**three, "labels": [1, 0, 0]},
        {**three, "rewards": [1.0, None, 3.0], "labels": [0, -1, 0]},
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    stage = RewardModel(config_of("reward_model", base, path, "reward_model.held_out=0"))
    assert stage.dropped == {"too_long": 0, "equal": 3} and stage.rows == 6
    pairs = [(better.tolist(), worse.tolist()) for better, worse in stage._pairs]
    assert pairs == [
        ([3, 4], [3, 5]),
        ([3, 5, 5], [3, 4]), ([3, 5, 5], [3, 6]),
        ([3, 4], [3, 5, 5]), ([3, 4], [3, 6]),
    ]  # fmt: skip


PAIR = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}
BAD_ROWS = [
    ("sft", {"prompt": "a"}, "line 1: no column 'response', found: prompt"),
    ("sft", {"response": "a"}, "no column 'prompt'"),
    ("sft", {"prompt": "", "response": "a"}, "the prompt has no tokens"),
    ("sft", {"prompt": 3, "response": "a"}, "column 'prompt' must be text"),
    ("sft", {"prompt_ids": [3], "response_ids": [16]}, "token id 16, outside the vocabulary of 16"),
    ("sft", {"prompt": "a", "response": "b " * 40}, "none of 1 rows can be used (too_long 1)"),
    ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "has 2 responses, and one is learned"),
    ("sft", {"prompt_ids": [3], "response": "a"}, "no column 'response_ids'"),
    ("sft", {"messages": [{"role": "user", "content": "a"}]}, "no column 'response'"),
    ("reward_model", {"prompt_ids": [3]}, "no responses; give chosen_ids and rejected_ids"),
    ("reward_model", {"prompt_ids": [3], "chosen_ids": [4]}, "no column 'rejected_ids'"),
    ("reward_model", {**PAIR, "chosen_ids": [4, PAD]}, "ends with the pad token 1"),
    ("reward_model", {"prompt_ids": [3], "responses_ids": [[4], [5]]}, "fewer than two responses"),
    ("reward_model", {**PAIR, "rejected_ids": [4]}, "none of 1 rows can be used (equal 1)"),
]


@pytest.mark.parametrize("kind, row, words", BAD_ROWS)
def test_a_bad_row_is_one_clear_line(kind, row, words, base, tmp_path):
    assert_refused(config_of(kind, base, write_rows(tmp_path / "r.jsonl", [row])), kind, words)


def test_bad_models_are_one_clear_line(tmp_path):
    text = write_rows(tmp_path / "text.jsonl", sft_rows(4))
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(4))
    bare = model_directory(tmp_path / "bare", tokenizer=False)
    unpadded = model_directory(tmp_path / "unpadded", pad=None)
    doubled = model_directory(tmp_path / "doubled", pad="<end>")
    at_odds = edited(model_directory(tmp_path / "at_odds"), eos_token_id=5)
    endless = edited(model_directory(tmp_path / "endless", tokenizer=False), eos_token_id=None)
    ids = write_rows(tmp_path / "ids.jsonl", [{"prompt_ids": [3], "response_ids": [4]}] * 4)
    rm = "reward_model"
    assert_refused(config_of("sft", bare, text), "sft", "has no tokenizer; give token ids")
    assert_refused(config_of("sft", endless, ids), "sft", "names an end token")
    assert_refused(config_of("sft", at_odds, text), "sft", "5 by its config.json, 0 by its token")
    assert_refused(config_of("sft", str(tmp_path / "none"), text), "sft", "cannot be read")
    assert_refused(config_of("sft", bare, str(tmp_path / "none.jsonl")), "sft", "none.jsonl")
    assert_refused(config_of("sft", "", ids), "sft", "sft.model=: there is no model")
    assert_refused(config_of("sft", bare, ""), "sft", "sft.path=: there are no rows")
    assert_refused(config_of(rm, unpadded, pairs), rm, "reward_model.pad_token=: ")
    assert_refused(config_of(rm, doubled, pairs), rm, "ends responses, too")
    assert_refused(config_of(rm, unpadded, pairs, f"{rm}.pad_token=nope"), rm, "is no token of")
    one_prompt = [{"prompt_ids": [3], "response_ids": [n]} for n in (4, 5)]
    path = write_rows(tmp_path / "one.jsonl", one_prompt)
    assert_refused(config_of("sft", bare, path), "sft", "set sft.held_out=0")


def test_a_pad_token_may_be_named(tmp_path):
    unpadded = model_directory(tmp_path / "unpadded", pad=None)
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(4))
    stage = RewardModel(config_of("reward_model", unpadded, pairs, "reward_model.pad_token=<pad>"))
    assert stage.network().config.pad_token_id == PAD


def edited(folder: str, **changes: object) -> str:
    """A model directory with other values in its config.json."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def assert_refused(config: Config, kind, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_stage(config, kind)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
