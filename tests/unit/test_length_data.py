"""The length problems' data: their distribution, their preferences, the same bytes each time."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load
from configs.rules_data import LONGEST_INSTRUCTION
from configs.schema import Config
from configs.schema_length import LengthDataConfig
from learner.stages import length_data, length_text
from learner.stages.length_words import INSTRUCTIONS, OPENERS, TOPICS, vocabulary

DATA = LengthDataConfig(sft=4000, pairs=2000, prompts=300)
SMALL = Config(length_data=LengthDataConfig(sft=40, pairs=20, prompts=10))


def lengths(rows, *columns):
    return np.array([[len(row[column].split()) for column in columns] for row in rows])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("length")
    length_data.write(path, SMALL)
    return path


# --- text ------------------------------------------------------------------------------------


def test_words_are_few_and_each_is_of_one_kind():
    words = vocabulary()
    topics = [word for kinds in TOPICS for kind in kinds for word in kind]
    assert 200 <= len(words) <= 300 and len(words) == len(set(words))
    assert not set(topics) & {*OPENERS, *INSTRUCTIONS}


def test_no_two_prompts_are_equal_and_none_is_longer_than_the_rule_says():
    prompts = length_text.instructions()
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 6144
    assert max(len(prompt.text.split()) for prompt in prompts) == LONGEST_INSTRUCTION


def test_sft_lengths_have_the_distribution_that_is_stated():
    asked = length_text.choose(20_000, 3, "sft")
    drawn = length_text.draw_lengths(DATA, asked, 3, "sft")
    for instruction in (0, 7):
        mine = drawn[[prompt.instruction == instruction for prompt in asked]]
        expected = length_text.length_weights(DATA, instruction)
        counts = np.bincount(mine, minlength=DATA.longest + 1)[1:]
        error = 5 * np.sqrt(expected * (1 - expected) / len(mine)) + 1 / len(mine)
        assert (abs(counts / len(mine) - expected) < error).all()
    assert expected.argmax() + 1 == 23  # mode 20 · 1.15, the longest instruction's


def test_without_an_effect_of_the_prompt_the_mode_is_the_one_set():
    plain = replace(DATA, prompt_effect=0.0)
    weights = [length_text.length_weights(plain, i) for i in range(len(INSTRUCTIONS))]
    assert {int(w.argmax()) + 1 for w in weights} == {20}
    assert np.allclose(np.sum(weights, 1), 1)


def test_a_response_counts_its_clauses_in_words_of_the_prompts_topic():
    rows = length_data.sft_rows(DATA, 0)
    assert len(rows) == 4000
    for row in rows[:200]:
        words, noun = row["response"].split(), row["prompt"].split()[-2]
        (topic,) = [kinds for kinds in TOPICS if noun in kinds[1]]
        assert words[::5] == OPENERS[: len(words[::5])]
        assert set(words) <= {*OPENERS, *(word for kind in topic for word in kind)}


# --- preferences -----------------------------------------------------------------------------


def test_min_length_prefers_the_shorter_response():
    chosen, rejected = lengths(length_data.preference_rows(DATA, 0, "min"), "chosen", "rejected").T
    assert (chosen < rejected).all() and chosen.min() >= 1


def test_mode_length_prefers_the_response_nearer_the_mode():
    rows = length_data.preference_rows(DATA, 0, "mode")
    chosen, rejected = abs(lengths(rows, "chosen", "rejected") - DATA.mode).T
    assert (chosen < rejected).all()


def test_skew_length_truncates_95_percent_of_the_pairs_to_exponential_lengths():
    rows = length_data.preference_rows(replace(DATA, pairs=6000), 0, "skew")
    length_N2 = lengths(rows, "chosen", "rejected")
    assert (length_N2[:, 0] < length_N2[:, 1]).all() and (length_N2 == 0).any()
    long_N = length_N2[:, 0] > 7  # both are: nearly all of the untouched, e^−4 of the truncated
    assert 0.05 < long_N.mean() < 0.05 + 0.03
    untouched = length_data.preference_rows(replace(DATA, skewed=0.0), 0, "skew")
    assert untouched == length_data.preference_rows(replace(DATA, wide=0.0), 0, "min")


def test_half_of_min_and_modes_pairs_have_any_length_up_to_twice_the_mode():
    asked = length_text.choose(20_000, 0, "pairs")
    wide_N2 = length_data._pair_lengths(replace(DATA, wide=1.0), asked, 0, "try", skewed=False)
    counts = np.bincount(wide_N2.ravel(), minlength=42)
    assert counts[0] == counts[41] == 0 and (abs(counts[1:41] / 1000 - 1) < 0.15).all()
    drawn_N2 = length_data._pair_lengths(DATA, asked, 0, "try", skewed=False)
    short = (wide_N2 <= 7).mean()
    narrow_N2 = length_data._pair_lengths(replace(DATA, wide=0.0), asked, 0, "try", skewed=False)
    assert (narrow_N2 <= 7).mean() < 0.02
    assert abs((drawn_N2 <= 7).mean() - 0.5 * short) < 0.02


def test_truncated_lengths_are_exponential_with_the_mean_set():
    data = replace(DATA, skewed=1.0, skew_mean=4.0)
    asked = length_text.choose(20_000, 0, "pairs")
    drawn = length_data._pair_lengths(data, asked, 0, "try", skewed=True)
    for k in (1, 3, 6):  # P(floor(x) ≥ k) = exp(−k/4)
        assert abs((drawn >= k).mean() - np.exp(-k / 4)) < 0.01


def test_pairs_that_cannot_differ_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"set length_data\.spread=0\.4") as caught:
        length_data.preference_rows(replace(DATA, spread=1e-3, prompt_effect=0.0), 0, "min")
    assert "\n" not in str(caught.value)


# --- files -----------------------------------------------------------------------------------


def test_equal_seeds_write_equal_bytes_and_others_do_not(folder, tmp_path):
    length_data.write(tmp_path / "again", SMALL)
    length_data.write(tmp_path / "other", replace(SMALL, seed=1))
    again, other = contents(tmp_path / "again"), contents(tmp_path / "other")
    assert again == contents(folder)
    same = {str(path) for path in other if other[path] == again[path]}
    assert same == {
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
    }


def test_finished_data_are_not_written_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    manifest = length_data.write(folder, SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert manifest == json.loads((folder / "manifest.json").read_text())


def test_what_was_interrupted_is_written_anew(folder, tmp_path):
    length_data.write(tmp_path, SMALL)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "sft.jsonl").write_text("half a l")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    length_data.write(tmp_path, SMALL)
    assert contents(tmp_path) == contents(folder)


def test_a_folder_with_data_of_other_settings_is_refused(folder):
    changed = replace(SMALL, length_data=replace(SMALL.length_data, mode=10))
    with pytest.raises(ValueError, match="another mode; name another folder"):
        length_data.write(folder, changed)


def test_the_starting_network_loads_with_its_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} == {0, 1, 2}
    assert model.config.eos_token_id == 0 and model.config.vocab_size == len(tokenizer)
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    ids = tokenizer(rows[0]["response"])["input_ids"]
    assert 2 not in ids and tokenizer.decode(ids) == rows[0]["response"]
    assert model.config.hidden_size // model.config.num_attention_heads == 32


def test_the_defaults_pass_the_rules():
    from configs.validate import check

    check(load("bandit", []))
