"""The evaluator: gold beside proxy, on the same fresh rollouts."""

import numpy as np
import pytest
import torch

from actors import policy
from actors.rollout import Version
from cluster.evaluate import Evaluator
from reward_server.rewards import describe
from tests.harness import LocalRewards, settings
from tests.rewards import save_model


def evaluated(*overrides: str):
    """What an evaluation of a network with random weights gives."""
    config = settings("bandit", "eval.samples=40", *overrides)
    evaluator = Evaluator(config, describe(config.gold))
    torch.manual_seed(0)
    weights = policy.flatten(policy.build(policy.architecture(config)))
    evaluator.start(LocalRewards(config), weights)
    return evaluator.evaluate(Version(0, 0), weights, 0)


def test_without_a_gold_reward_there_is_no_gold():
    assert not [name for name in evaluated() if "gold" in name]


def test_gold_is_of_the_same_rollouts_as_the_reward():
    same = evaluated("gold.kind=peak")
    assert same["reward_gold"] == same["reward_eval"] > 0
    assert same["reward_gold_error"] == same["reward_eval_error"] > 0
    other = evaluated("gold.kind=length", "gold.target=4", "gold.scale=3")
    assert other["reward_eval"] == same["reward_eval"] and other["reward_gold"] == -2
    assert other["reward_gold_error"] == 0 and other["gold_failures"] == 0


def test_a_model_is_gold_in_the_evaluators_own_process_and_must_be_the_runs(tmp_path):
    folder = save_model(tmp_path / "model")
    found = evaluated("gold.kind=model", f"gold.path={folder}")
    assert np.isfinite(found["reward_gold"]) and found["reward_gold"] != found["reward_eval"]
    config = settings("bandit", "gold.kind=model", f"gold.path={folder}")
    before = describe(config.gold)
    save_model(folder, seed=1)
    with pytest.raises(RuntimeError, match="was model"):
        Evaluator(config, before)


def test_gold_that_fails_is_counted_and_not_averaged(tmp_path, monkeypatch):
    (tmp_path / "my_gold_at_hand.py").write_text(
        "def some(prompts, responses):\n"
        "    return [1.0 if r[0] < 50 else None for r in responses]\n"
        "def none(prompts, responses):\n"
        "    raise OSError('no gold today')\n"
    )
    monkeypatch.chdir(tmp_path)
    some = evaluated("gold.kind=function", "gold.path=my_gold_at_hand:some")
    assert some["reward_gold"] == 1 and 0 < some["gold_failures"] < 40
    assert "NoneType" in some["gold_failure"]
    none = evaluated("gold.kind=function", "gold.path=my_gold_at_hand:none")
    assert "reward_gold" not in none and none["gold_failures"] == 40
    assert "no gold today" in none["gold_failure"] and none["reward_eval"] == some["reward_eval"]
