"""A reward that does not fit the policy is one clear line before anything starts."""

import pytest

from actors import policy
from cluster import inputs
from configs.errors import ConfigError
from tests.harness import settings
from tests.rewards import edit_config, save_model, save_tokenizer, shape

WORDS = ["<end>", "a", "b", "c"]


@pytest.fixture
def folders(tmp_path):
    """A policy and a reward model with one vocabulary of words, and what names them."""
    model, reward = tmp_path / "policy", save_model(tmp_path / "reward")
    policy.build(shape("gpt_neox")).save_pretrained(model)
    for folder in (model, reward):
        save_tokenizer(folder, *WORDS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [1, 2]}\n')
    given = [f"policy.path={model}", "prompts.source=jsonl", f"prompts.path={prompts}"]
    return model, reward, given


def refusal(given, *more: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        inputs.check(settings("bandit", *given, *more))
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_policys_own_tokenizer_is_taken_also_where_its_file_is_written_differently(folders):
    _, reward, given = folders
    given += ["reward.kind=model", f"reward.path={reward}"]
    inputs.check(settings("bandit", *given))
    file = reward / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    inputs.check(settings("bandit", *given))


@pytest.mark.parametrize(
    "words, why",
    [
        (["<end>", "b", "a", "c"], "token 1 is 'b' to it and 'a' to the policy"),
        ([*WORDS, "d"], "token 4 is 'd' to it and unknown to the policy"),
        (WORDS[:3], "token 3 is unknown to it and 'c' to the policy"),
    ],
)
def test_another_tokenizer_is_refused_with_a_token_that_differs(folders, words, why):
    _, reward, given = folders
    save_tokenizer(reward, *words)
    error = refusal(given, "gold.kind=model", f"gold.path={reward}")
    assert error.key == "gold.path" and why in error.problem and "tokenizer of" in error.fix


def test_a_tokenizer_that_only_one_has_is_missed_in_the_other(folders):
    model, reward, given = folders
    given += ["reward.kind=model", f"reward.path={reward}"]
    (reward / "tokenizer.json").unlink()
    error = refusal(given)
    assert error.key == "reward.path" and "has no tokenizer.json" in error.problem
    save_tokenizer(reward, *WORDS)
    (model / "tokenizer.json").unlink()
    error = refusal(given)
    assert error.key == "policy.path" and "reward.path" in error.problem
    (reward / "tokenizer.json").unlink()
    inputs.check(settings("bandit", *given))
    edit_config(reward, vocab_size=90)
    assert "knows 90 token ids, and the policy has 100" in refusal(given).problem


def test_a_damaged_tokenizer_is_one_line(folders):
    _, reward, given = folders
    (reward / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: is no tokenizer: [^\n]*$"):
        inputs.check(settings("bandit", *given, "reward.kind=model", f"reward.path={reward}"))


def test_a_length_must_know_the_policys_end_tokens(folders):
    model, _, given = folders
    given += ["gold.kind=length"]
    error = refusal(given)
    assert error.key == "gold.end_tokens" and error.fix == "set gold.end_tokens=[0]"
    inputs.check(settings("bandit", *given, "gold.end_tokens=[0]"))
    edit_config(model, eos_token_id=[0, 2])
    assert refusal(given, "gold.end_tokens=[0]").fix == "set gold.end_tokens=[0,2]"
    inputs.check(settings("bandit", *given, "gold.end_tokens=[0,2]"))
    assert refusal([], "reward.kind=length", "reward.end_tokens=[1]").fix.endswith("=[]")
