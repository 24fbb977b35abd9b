"""A learned reward scores each text for itself, and says who it is."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.choices import RewardKind
from configs.schema import RewardConfig
from reward_server import rewards
from reward_server.reward_model import micro_batches
from reward_server.rewards import describe, score_safely
from tests.rewards import CONTEXT, VOCABULARY, edit_config, save_model, shape


def config(folder, **changes) -> RewardConfig:
    return RewardConfig(kind=RewardKind.model, path=str(folder), **changes)


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def folder(request, tmp_path_factory):
    torch.set_num_threads(1)
    return save_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def texts():
    """60 prompts and responses of unlike lengths; some end with the token that pads."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, VOCABULARY, draw.integers(1, 20)).tolist() for _ in range(60)]
    responses = [draw.integers(1, VOCABULARY, draw.integers(0, 40)).tolist() for _ in range(60)]
    return prompts, [r + [0] * (i % 2) for i, r in enumerate(responses)]


@pytest.fixture(scope="module")
def alone(folder, texts):
    """Each text's score by transformers itself, unpadded: logits at the text's last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None  # it then takes the last token, whatever it is
    with torch.inference_mode():
        return np.array([
            model(torch.tensor([prompt + response])).logits.item()
            for prompt, response in zip(*texts)
        ])  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_a_score_does_not_depend_on_its_batch_and_comes_back_in_order(
    folder, texts, alone, batch_tokens
):
    reward = rewards.load(config(folder, batch_tokens=batch_tokens))
    assert np.ptp(alone) > 1, "scores that hardly differ would agree whatever the batch"
    np.testing.assert_allclose(reward(*texts), alone, atol=1e-5)
    some = np.random.default_rng(1).permutation(60)[:17]
    shuffled = reward([texts[0][i] for i in some], [texts[1][i] for i in some])
    np.testing.assert_allclose(shuffled, alone[some], atol=1e-5)


def test_an_end_token_is_scored_and_an_empty_response_leaves_the_prompt(folder):
    reward = rewards.load(config(folder))
    ended, empty, prompt = reward([[5, 6], [5, 6], [5]], [[0], [], [6]])
    assert abs(ended - empty) > 1e-3, "the end token, which also pads, was not looked at"
    assert abs(empty - prompt) < 1e-5


def test_micro_batches_keep_the_budget_and_hold_each_text_once():
    length_N = np.random.default_rng(0).integers(1, 50, 300)
    batches = micro_batches(length_N, 120)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert all(len(rows) * length_N[rows].max() <= 120 for rows in batches)
    padded = sum(len(rows) * length_N[rows].max() for rows in batches)
    assert padded < 1.05 * length_N.sum(), "sorted by length, little is padding"
    assert len(batches) < 1.2 * length_N.sum() / 120 + 50
    assert [rows.tolist() for rows in micro_batches(np.array([9, 200, 3]), 20)] == [[2, 0], [1]]
    assert micro_batches(np.array([], dtype=int), 20) == []


@pytest.mark.parametrize(
    "prompt, response, why",
    [
        ([1] * CONTEXT, [2], f"have {CONTEXT + 1} tokens; the reward model's context"),
        ([], [], "have 0 tokens"),
        ([1], [VOCABULARY], f"token {VOCABULARY} is in the text; the reward model knows 0 … 99"),
        ([1], [-1], "token -1 is in the text"),
    ],
)
def test_a_text_that_it_cannot_read_fails_alone_and_says_why(folder, prompt, response, why):
    scores = score_safely(rewards.load(config(folder)), [[1], prompt, [2]], [[1], response, [2]])
    assert list(scores.failures) == [1] and why in scores.failures[1]
    assert np.isnan(scores.reward).tolist() == [False, True, False]


def test_scores_carry_name_and_hash_which_change_with_weights_and_config(tmp_path):
    folder = save_model(tmp_path / "model")
    said = describe(config(folder))
    scores = rewards.InProcess(config(folder)).score([[1]] * 3, [[2]] * 3)
    assert scores.identity == said and said.startswith(f"model({folder}, sha256=")
    assert describe(config(save_model(tmp_path / "twin")))[-18:] == said[-18:]
    save_model(folder, seed=1)
    other = describe(config(folder))
    edit_config(folder, layer_norm_eps=0.5)
    assert len({said, other, describe(config(folder))}) == 3
    with pytest.raises(RuntimeError, match="sha256=.* here, and was model"):
        rewards.InProcess(config(folder), identity=said)


def test_the_hash_reads_a_file_once_until_it_changes(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model")
    said, opened, original = describe(config(folder)), [], Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a: opened.append(p) or original(p, *a))
    assert describe(config(folder)) == said and not opened
    os.utime(folder / "model.safetensors", (1, 1))
    assert describe(config(folder)) == said
    assert [path.name for path in opened] == ["model.safetensors"]


def _causal(folder):
    AutoModelForCausalLM.from_config(shape("gpt_neox")).save_pretrained(folder)


def _two_labels(folder):
    save_model(folder, num_labels=2)


def _pickled(folder):
    save_model(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _damaged(folder):
    save_model(folder)
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(40))


def _bare(folder):
    folder.mkdir()


@pytest.mark.parametrize(
    "make, why",
    [
        (_causal, "has no score.weight, so it is no reward model"),
        (_two_labels, "scores 2 labels; a reward model has num_labels=1"),
        (_pickled, "has no *.safetensors"),
        (_damaged, "model.safetensors is damaged"),
        (_bare, "no config.json that can be read"),
        (
            lambda folder: None,
            "no such directory; correct it, or pin a hub name with gold.",
        ),
    ],
)
def test_what_is_no_reward_model_is_one_line_before_anything_is_loaded(tmp_path, make, why):
    make(tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        rewards.check(config(tmp_path / "model"), section="gold")
    text = str(caught.value)
    assert why in text and "\n" not in text and text.startswith(f"gold.path={tmp_path}")


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    folder = save_model(tmp_path / "model")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"weights are missing: gpt_neox\.layers\.2"):
        rewards.load(config(folder))
