"""Which stages a preset names, and where their outputs go."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import inputs
from cluster.stages import pipeline
from configs.errors import ConfigError
from configs.load import prepare, presets

LENGTH = [name for name in presets() if name.startswith("length_")]


@pytest.mark.parametrize("preset", LENGTH)
def test_every_length_preset_names_the_stages_that_it_reads(preset):
    config = pipeline.named(prepare(preset, ["run.dir=out"]))
    assert config.sft.path == "out/length/data/sft.jsonl"
    assert config.policy.path == config.reward_model.model == "out/length/sft/hf"
    assert config.prompts.path == "out/length/data/prompts.jsonl"
    problem = preset.split("_")[1]
    if config.data.source.value == "offline":
        assert config.data.path == f"out/length/data/preferences_{problem}.jsonl"
        assert config.pipeline.reward_model == ""
    else:
        assert config.reward.path == f"out/length/reward_{problem}/hf"


def test_three_problems_share_data_and_sft_and_each_method_has_its_preset():
    assert {name.partition("_")[2] for name in LENGTH} == {
        f"{problem}{method}"
        for problem in ("min", "mode", "skew")
        for method in ("", "_ppo", "_rwr", "_best_of_n", "_offline_dpo", "_pref_ft")
    }


def test_a_stage_that_the_preset_does_without_is_named_in_the_error():
    config = prepare("length_min", ["pipeline.sft="])
    with pytest.raises(ConfigError, match=r"there is no stage 'sft' in this preset"):
        pipeline.named(config)


def test_training_without_its_stages_says_what_to_run():
    with pytest.raises(ConfigError, match=r"run python -m cluster pipeline with this preset"):
        inputs.check(prepare("length_min", []))


def test_names_are_filled_in_on_a_copy():
    config = prepare("length_min", [])
    pipeline.named(config)
    assert config.policy.path == "{sft}/hf"


def test_stages_run_in_order_with_the_pipelines_seed_and_the_run_keeps_its_own(monkeypatch):
    ran = []

    def note(name):
        return lambda config, directory: ran.append((name, directory, config.seed))

    monkeypatch.setattr(pipeline, "_RUN", {name: note(name) for name in pipeline.STAGES})
    config = replace(prepare("length_min", ["run.dir=out"]), seed=3)
    assert pipeline.run_stages(config).seed == 3
    assert ran == [
        ("data", Path("out/length/data"), 0),
        ("sft", Path("out/length/sft"), 0),
        ("reward_model", Path("out/length/reward_min"), 0),
    ]
