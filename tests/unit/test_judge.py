"""The trained policy beside π_ref: what `python -m cluster evaluate` says of a run."""

import json

import pytest

from actors import policy
from cluster.reference import reference_weights
from cluster.stages import judge
from configs.load import prepare, to_yaml


@pytest.fixture
def run(tmp_path):
    """A run of the bandit that ended with π_ref itself."""
    config = prepare("bandit", [])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    model = policy.build(policy.architecture(config))
    policy.unflatten(model, reference_weights(config))
    for step in (20, 100):
        model.save_pretrained(tmp_path / "checkpoints" / f"step-{step}" / "hf")
    return tmp_path


def test_the_reference_policy_ties_with_itself_at_no_divergence(run):
    out = judge.evaluate(run, ["samples=60"])
    assert out["policy"] == "step-100"
    assert out["win_rate"] == 0.5
    assert out["win_rate_error"] == 0.0
    assert out["reward_gold"] == out["reward_gold_reference"] > 0
    assert out["kl_to_reference_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert out["length"] == 10
    assert out == json.loads((run / "evaluation.json").read_text())
    assert "wins against π_ref" in judge.told(out)


def test_another_reward_judges_where_a_gold_one_is_named(run):
    out = judge.evaluate(run, ["samples=20", "gold.kind=peak", "gold.centre=20"])
    assert out["reward"] == "peak(centre=20, width=10)"


def test_a_run_without_a_policy_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no run is there; name a run's directory"):
        judge.evaluate(tmp_path, [])
    (tmp_path / "config.yaml").write_text(to_yaml(prepare("bandit", [])), encoding="utf-8")
    with pytest.raises(ValueError, match="no policy is exported there"):
        judge.evaluate(tmp_path, [])


@pytest.mark.parametrize("count", ["0", "1", "many", "-5"])
def test_samples_are_a_number(run, count):
    with pytest.raises(ValueError, match="not a number of responses"):
        judge.evaluate(run, [f"samples={count}"])
