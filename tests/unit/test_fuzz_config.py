"""Whatever a preset or an override holds: settings that a run can start from, or one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st

from configs.load import ConfigError, flat_keys, load, prepare, presets, to_yaml
from configs.validate import check
from tests.fuzz import DEEP, SCALARS, TEXT, VALUES, assert_one_line, fuzz, nested, trial

SECTIONS = sorted({key.rpartition(".")[0] for key in flat_keys()} - {""})
KEYS = st.sampled_from([*flat_keys(), *SECTIONS, "base", "lr", "learnr.lr", "B", "seed.x"])
FREE = ["run.dir", "policy.cache_dir", "cluster.address", "prompts.column", "reward.token_env"]
LIKELY = st.sampled_from(
    ["0", "1", "2", "10", "100", "1e-3", "-1", "0.5", "null", "true", "off", "ppo", "dpo", "rest",
     "reinforce", "vllm", "pipelined", "ready", "in_flight", "offline", "jsonl", "token", "none",
     "first_use", "leave_one_out", "standardised", "function", "mod:f", "some/path", "cosine",
     "actor.put.after@1:kill", "actor.put.after@9:nap", "${seed}", "${learner.minibatch}",
     "\\${seed}", "a\\\\\\${x}\\", "${oc.env:HOME}", "${oc.env:}", "${run}", "???",
     "${run.name}", "0x10", "1_0", "1000000007", "9007199254740993"]
)  # fmt: skip
DEEP_EXPRESSION = st.sampled_from([1, 8, 40, 300]).map(lambda n: nested(n, "${a:", "}"))
WRITTEN = LIKELY | SCALARS.map(str) | DEEP_EXPRESSION | DEEP
YAML_VALUES = st.one_of(
    VALUES.map(json.dumps),
    WRITTEN,
    st.sampled_from(
        ["!!timestamp x", "!!bool x", '!!int ""', '!!float ""', "!!binary x", "!!set {a}",
         "&a [*a]", "!!python/object:os.system {}", "2001-01-01", "!x y", "*nowhere", "1:30",
         "{<<: [1]}", "{? [a] : b}", "'", "|", "\t", "@", ".inf", "0b1", "0o9", "!!omap [a: 1]"]
    ),
)  # fmt: skip


def works(preset: str, overrides: list[str], folder: Path) -> None:
    """`prepare` gives a config that is whole, or a ConfigError."""
    try:
        config = prepare(preset, overrides)
    except ConfigError as error:
        assert_one_line(str(error), 400)
        return
    check(config)
    again = folder / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load(str(again), []) == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@st.composite
def preset_text(draw: Callable[..., Any]) -> str:
    """Lines that look like a preset's, with anything as values, in any depth and order."""
    lines = []
    for _ in range(draw(st.integers(0, 5))):
        key = draw(KEYS | TEXT)
        value = draw(YAML_VALUES)
        if "." in key and draw(st.booleans()):
            section, _, name = key.rpartition(".")
            lines.append(f"{section}:\n  {name}: {value}")
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n---\na: 1\n", "\x85", "\ufeff"]))


@fuzz(80, text=preset_text(), base=st.sampled_from(["", "base: bandit\n", "base: offline_rwr\n"]))
@example(text="run: " + nested(400_000), base="")  # a segmentation fault in PyYAML's composer
@example(text="seed: !!timestamp x", base="")
@example(text='seed: !!int ""', base="")
@example(text="learner.lr: 1" + "0" * 400, base="")
@example(text="seed: 0x" + "f" * 5000, base="")
@example(text="run.samples_per_round: 0x" + "f" * 5000, base="base: bandit\n")
def test_any_preset_is_settings_or_one_clear_line(folder: Path, text: str, base: str) -> None:
    path = folder / "fuzzed.yaml"
    path.write_bytes((base + text).encode("utf-8", "surrogatepass"))
    with trial("config: presets"):
        works(str(path), [], folder)


@fuzz(30, content=st.binary(max_size=80))
def test_any_bytes_as_a_preset_are_one_clear_line(folder: Path, content: bytes) -> None:
    path = folder / "bytes.yaml"
    path.write_bytes(content)
    with trial("config: presets"):
        works(str(path), [], folder)


PAIRS = st.tuples(KEYS, WRITTEN | TEXT).map("=".join)


@fuzz(
    100,
    preset=st.sampled_from(sorted(presets())),
    overrides=st.lists(PAIRS | st.tuples(TEXT, TEXT).map("=".join) | TEXT, max_size=4),
)
@example(preset="bandit", overrides=["run.dir=\\${seed}"])  # was another text when read back
@example(preset="bandit", overrides=["run.dir=" + nested(300, "${a:", "}")])
@example(preset="bandit", overrides=["run.dir=\udcff"])  # what no file takes
@example(preset="bandit", overrides=["x" * 5000])
@example(preset="bandit", overrides=["run.dir=" + nested(100_000)])
@example(preset="bandit", overrides=[f"{key}=" + "\U000e0001" * 4096 for key in FREE])
@example(preset="bandit", overrides=["a\rb"])
def test_any_override_is_taken_or_named_in_one_clear_line(
    folder: Path, preset: str, overrides: list[str]
) -> None:
    with trial("config: overrides"):
        works(preset, overrides, folder)


FITTING = {
    "rollout.responses_per_prompt": st.integers(1, 4),
    "learner.minibatch": st.integers(1, 24),
    "replay.samples_per_round": st.integers(1, 48),
    "replay.inner_epochs": st.integers(1, 4),
    "learner.ranks": st.integers(1, 4),
    "learner.micro_batch": st.integers(0, 12),
    "rollout.lease": st.integers(1, 20),
    "replay.lag": st.integers(0, 5),
    "replay.max_age": st.none() | st.integers(0, 60),
    "objective.name": st.sampled_from(["ipo", "ppo", "rwr", "rest", "best_of_n", "dpo"]),
    "replay.schedule": st.sampled_from(["lockstep", "pipelined"]),
    "learner.lr": st.floats(0, 1e6),
    "run.dir": WRITTEN | TEXT,
    "policy.cache_dir": TEXT,
}


@fuzz(40, settings=st.fixed_dictionaries({}, optional=FITTING))
def test_settings_that_nearly_fit_are_whole_or_one_clear_line(
    folder: Path, settings: dict[str, Any]
) -> None:
    written = [f"{key}={'null' if v is None else v}" for key, v in settings.items()]
    with trial("config: overrides"):
        works("bandit", written, folder)


NAMES = ["a", "b", "c", "d"]


@fuzz(15, bases=st.fixed_dictionaries({n: st.sampled_from([*NAMES, "", "bandit"]) for n in NAMES}))
def test_presets_based_on_each_other_in_any_way_come_to_an_end(
    folder: Path, bases: dict[str, str]
) -> None:
    for name, base in bases.items():
        end = ".yaml" if base in NAMES else ""
        (folder / f"{name}.yaml").write_text(f"base: {base}{end}\n" if base else "seed: 1\n")
    with trial("config: presets"):
        works(str(folder / "a.yaml"), [], folder)


@fuzz(15, depth=st.integers(1, 40), width=st.integers(1, 12), key=st.sampled_from(["run", "x"]))
def test_aliases_of_aliases_do_not_grow_without_limit(
    folder: Path, depth: int, width: int, key: str
) -> None:
    path = folder / "bomb.yaml"
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    path.write_text("\n".join([*lines, f"{key}: *a{depth - 1}"]))
    with trial("config: presets"), pytest.raises(ConfigError) as caught:
        prepare(str(path), [])
    assert_one_line(str(caught.value), 400)
