"""Settings: presets load, mistakes are named in one line, and derived values resolve."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import load as loading
from configs.choices import DataSource, EngineKind
from configs.load import ConfigError, flat_keys, load, prepare, presets, resolve, to_yaml
from configs.objectives import TABLE
from configs.validate import check
from tests.config_cases import assert_one_line, bandit

QUICK = settings(max_examples=20, deadline=None)


# --- presets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_validates_and_is_described(name):
    config = prepare(name, [])
    assert len(presets()[name]) > 20
    assert config.learner.micro_batch >= 1


def test_the_bandit_preset_is_the_main_job():
    config = prepare("bandit", [])
    assert (config.objective.name, config.objective.tau) == ("ipo", 0.02)
    assert config.replay.samples_per_round == config.learner.minibatch == 100
    assert (config.rollout.responses_per_prompt, config.replay.inner_epochs) == (10, 10)
    assert (config.rounds, config.replay.max_age) == (100, 9)


def test_every_objective_has_a_preset():
    assert {load(name, []).objective.name for name in presets()} == set(TABLE)


def test_a_preset_is_found_by_name_by_file_name_and_by_path(tmp_path):
    path = Path(loading.__file__).parent / "bandit_ppo.yaml"
    assert load("bandit_ppo", []) == load("bandit_ppo.yaml", []) == load(str(path), [])
    assert loading.preset_name(str(path)) == "bandit_ppo"


def test_a_preset_overrides_its_base_and_overrides_come_last(tmp_path):
    (tmp_path / "first.yaml").write_text("base: bandit_ppo\nlearner:\n  lr: 0.5\n  warmup: 3\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nlearner.lr: 0.25\n")
    config = load(str(tmp_path / "second.yaml"), ["learner.warmup=7", "learner.warmup=8"])
    assert (config.objective.name, config.learner.lr, config.learner.warmup) == ("ppo", 0.25, 8)


def test_settings_of_two_loads_share_nothing(tmp_path):
    """Though the file's text and the schema's tree are read once."""
    path = tmp_path / "lists.yaml"
    path.write_text("reward:\n  end_tokens: [0]\n")
    first, second = (load(str(path), []) for _ in range(2))
    first.reward.end_tokens.append(1)
    first.learner.lr = 7.0
    assert second == load(str(path), []) != first
    assert second.reward.end_tokens == [0]


def test_presets_based_on_each_other_are_refused(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    with pytest.raises(ConfigError, match="one → two → one"):
        load(str(tmp_path / "one.yaml"), [])


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n", "seed: 1\nseed: 2\n", "\x00", "run: {name: ${", "base: [1]\n",
             "base: nothing_like_it\n", "a: &a [*a]\n", "learnr:\n  lr: 1\n", "learner: 3\n"],
)  # fmt: skip
def test_a_broken_preset_is_one_clear_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path), [])
    assert_one_line(caught.value)


def test_a_missing_preset_suggests_close_ones():
    with pytest.raises(ConfigError, match="bandit_ppo"):
        load("bandit_poo", [])


# --- overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, suggestion",
    [
        ("lr=1", "learner.lr"),
        ("learnr.lr=1", "learner.lr"),
        ("rollout.actor=2", "rollout.actors"),
        ("minibatch=10", "learner.minibatch"),
        ("objective.lag=1", "replay.lag"),
        ("learner.learning_rate=1", "learner.lr"),
        ("B=100", "replay.samples_per_round"),
    ],
)
def test_an_unknown_key_names_key_value_and_close_matches(override, suggestion):
    with pytest.raises(ConfigError) as caught:
        load("bandit", [override])
    key, _, value = override.partition("=")
    assert_one_line(caught.value)
    assert f"{key}={value}" in str(caught.value) and suggestion in caught.value.fix


@pytest.mark.parametrize(
    "override, expected",
    [
        ("learner.lr=fast", "a number"),
        ("learner.ranks=1.5", "an integer"),
        ("learner.ranks=", "an integer"),
        ("prompts.shuffle=maybe", "true or false"),
        ("rollout.engine=tensorrt", "one of torch, vllm"),
        ("replay.max_age=old", "an integer or null"),
        ("run.name=${", "text"),
    ],
)
def test_a_wrong_type_names_what_is_expected(override, expected):
    with pytest.raises(ConfigError) as caught:
        load("bandit", [override])
    key, _, value = override.partition("=")
    assert_one_line(caught.value)
    assert caught.value.key == key and caught.value.value == value
    assert expected in caught.value.problem


@pytest.mark.parametrize(
    "override",
    [
        "learner",
        "learner=3",
        "seed.x=1",
        "run.name=???",
        "=",
        "run.name=${nothing}",
        "learner.lr=1\n2",
        "learner.ranks=${seed.a}",
    ],
)
def test_a_malformed_override_is_one_clear_line(override):
    with pytest.raises(ConfigError) as caught:
        load("bandit", [override])
    assert_one_line(caught.value)


def test_overrides_take_their_fields_type():
    config = load("bandit", ["rollout.engine=vllm", "run.name=007", "learner.lr=1e-2",
                             "replay.max_age=null", "prompts.shuffle=on"])  # fmt: skip
    assert config.rollout.engine is EngineKind.vllm
    assert (config.run.name, config.learner.lr, config.replay.max_age) == ("007", 0.01, None)
    assert config.prompts.shuffle is True


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ConfigError("a.b", 1, "is wrong", "set a.b=2")))
    assert str(error) == "a.b=1: is wrong; set a.b=2" and isinstance(error, ValueError)


@QUICK
@given(st.lists(st.tuples(st.sampled_from([*flat_keys(), "lr", "x.y"]), st.text(max_size=12))))
def test_any_override_loads_or_is_one_clear_line(pairs):
    try:
        prepare("bandit", [f"{key}={value}" for key, value in pairs])
    except ConfigError as error:
        assert_one_line(error)


# --- resolving -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, overrides, max_age",
    [
        ("bandit", ["replay.lag=3"], 12),
        ("bandit", ["replay.samples_per_round=400", "replay.inner_epochs=2"], 7),
        ("bandit", ["replay.schedule=pipelined"], 19),
        ("bandit_pipelined", ["replay.max_age=null"], 1),
        ("bandit_pipelined", ["replay.max_age=0"], 0),
        ("offline_ipo", [], None),
    ],
)
def test_max_age_defaults_to_the_tightest_that_the_schedule_keeps(preset, overrides, max_age):
    assert prepare(preset, overrides).replay.max_age == max_age


def test_micro_batch_defaults_to_a_ranks_share_in_whole_groups():
    assert prepare("bandit", ["learner.ranks=3"]).learner.micro_batch == 40


def test_a_lease_is_at_most_a_round():
    config = prepare("bandit", ["replay.samples_per_round=20", "learner.minibatch=20"])
    assert config.rollout.lease == 2


def test_resolving_leaves_its_input_alone_and_changes_nothing_twice():
    config = load("bandit", [])
    before = to_yaml(config)
    resolved = resolve(config)
    assert to_yaml(config) == before
    assert resolve(resolved) == resolved
    check(resolved)


@QUICK
@given(
    lr=st.floats(1e-9, 1e3),
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,30}", fullmatch=True),
    source=st.sampled_from(DataSource),
    age=st.none() | st.integers(0, 10**9),
)
def test_yaml_reads_back_to_an_equal_config(tmp_path_factory, lr, name, source, age):
    config = bandit()
    config.learner.lr, config.run.name, config.data.source = lr, name, source
    config.replay.max_age = age
    path = tmp_path_factory.getbasetemp() / "roundtrip.yaml"
    path.write_text(to_yaml(config))
    assert load(str(path), []) == config
