"""Settings from presets and `key=value` overrides, merged onto the typed `Config`.

config = load("bandit", ["objective.name=ppo", "learner.lr=3e-4"])
check(config)                # configs.validate
config = resolve(config)     # or all three at once: prepare(preset, overrides)
"""

import copy
import difflib
import enum
import functools
import json
import operator
import os
import pickle
import re
import typing
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.bounds import any_of, leaves
from configs.choices import DataSource, Precision, Schedule
from configs.errors import ConfigError
from configs.schema import Config
from configs.validate import check
from configs.yaml_files import read_mapping

PRESETS = Path(__file__).parent
MISMATCH = {Precision.float32: 1e-5, Precision.bfloat16: 1e-2}  # nats per token
LONGEST_TEXT = 4_096  # characters of a setting, as of a path; so that a preset can hold them all
_REFUSALS = (OmegaConfBaseException, ValueError, TypeError, OverflowError, RecursionError)
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # what no UTF-8 file takes: undecodable arguments
_INTERPOLATION = re.compile(r"(\\*)\$\{")  # backslashes before it are escapes to OmegaConf
OTHER_NAMES = {  # what people type → our setting; Algorithm 1's letters among them
    "B": "replay.samples_per_round",
    "C": "rollout.responses_per_prompt",
    "M": "learner.minibatch",
    "T": "replay.inner_epochs",
    "learning_rate": "learner.lr",
    "batch_size": "learner.minibatch",
    "group_size": "rollout.responses_per_prompt",
}

__all__ = [
    "ConfigError",
    "flat_keys",
    "load",
    "prepare",
    "preset_name",
    "presets",
    "resolve",
    "to_yaml",
]  # fmt: skip


def prepare(preset: str, overrides: list[str]) -> Config:
    """`load`, `check` and `resolve` in one: settings that a run can start from."""
    config = load(preset, overrides)
    check(config)
    return resolve(config)


def load(preset: str, overrides: list[str]) -> Config:
    """The typed settings of a preset with `key=value` overrides applied in order.

    preset: a YAML file, or the name of one in `configs/`, with or without `.yaml`. A preset may
    name a `base`, another preset (also a path relative to its own file), which it overrides.
    Raises ConfigError for an unknown key, a wrong type, or a preset that cannot be read. Whether
    the settings fit together is `configs.validate.check`'s business.
    """
    tree = pickle.loads(_schema())
    for key, value in _preset_leaves(_find(preset, None), ()):
        _assign(tree, key, value)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(text, "", "has no value", f"write {text.strip() or 'key'}=value")
        _assign(tree, key.strip(), _written(key.strip(), value.strip()))
    return _to_object(tree)


@functools.cache
def _schema() -> bytes:
    """The tree of all settings at their defaults, pickled: to read it takes 2 ms, to make it 70."""
    return pickle.dumps(OmegaConf.structured(Config))


def resolve(config: Config) -> Config:
    """A copy of a checked config with the derived values filled in.

    `replay.max_age` (steps): the tightest that the schedule keeps, lag + S − 1 in lockstep and
    lag + 2S − 1 pipelined (law 6); offline rollouts have no age and keep None.
    `learner.micro_batch`: a rank's share of M, rounded up to whole groups.
    `rollout.lease`: at most B/C.
    `limits.engine_mismatch_kl` (nats per token): what the dtype's rounding explains.
    """
    config = copy.deepcopy(config)
    c, ranks = config.rollout.responses_per_prompt, config.learner.ranks
    if config.replay.max_age is None and config.data.source is not DataSource.offline:
        rounds = 2 if config.replay.schedule is Schedule.pipelined else 1
        config.replay.max_age = config.replay.lag + rounds * config.steps_per_round - 1
    if config.learner.micro_batch == 0:
        config.learner.micro_batch = c * -(-config.learner.minibatch // (c * ranks))
    if config.limits.engine_mismatch_kl is None:
        config.limits.engine_mismatch_kl = MISMATCH[config.learner.precision]
    config.rollout.lease = min(config.rollout.lease, config.groups_per_round)
    return config


def to_yaml(config: Config) -> str:
    """The settings as YAML that `load` reads back to an equal config."""
    config = copy.deepcopy(config)
    for key, value in leaves(config):
        if isinstance(value, str) and "${" in value:  # as it stands, not to be resolved again
            section, _, name = key.rpartition(".")
            escaped = _INTERPOLATION.sub(r"\1\1\\${", value)
            setattr(operator.attrgetter(section)(config) if section else config, name, escaped)
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def flat_keys() -> tuple[str, ...]:
    """Every setting's full dotted name, in the schema's order."""
    return tuple(_leaves())


def presets() -> dict[str, str]:
    """Name → description (the first comment line) of every preset in `configs/`."""
    found = {}
    for path in sorted(PRESETS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[path.stem] = first.lstrip("# ").strip() if first.startswith("#") else ""
    return found


def preset_name(preset: str) -> str:
    """The name that runs of this preset take: its file's, without folder and ending."""
    return _find(preset, None).stem


def _find(preset: str, beside: Path | None) -> Path:
    """The preset's file: a path (from `beside`, else from here), else a name in `configs/`."""
    named = Path(preset)
    here = [beside / named] if beside else [named]
    candidates = [path for path in here if path.suffix in {".yaml", ".yml"}]
    if len(named.parts) == 1:
        candidates += [PRESETS / named.name, PRESETS / f"{named.name}.yaml"]
    for path in candidates:
        if path.suffix in {".yaml", ".yml"} and os.path.isfile(path):
            return path.resolve()
    close = difflib.get_close_matches(named.stem, presets(), n=3) or list(presets())
    raise ConfigError("preset", preset, "no such preset", f"use a YAML file or {any_of(close)}")


def _preset_leaves(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, object]]:
    """Dotted keys and values of a preset, those of its base first."""
    if path in above:
        chain = " → ".join(p.stem for p in (*above[above.index(path) :], path))
        raise ConfigError("base", path.stem, f"presets are based on each other: {chain}",
                          "remove one `base:`")  # fmt: skip
    tree = read_mapping(path, "preset")
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError("base", base, f"not a preset's name, in {path.name}", "name one")
        yield from _preset_leaves(_find(base, path.parent), (*above, path))
    yield from _flatten(tree, "")


def _flatten(tree: dict[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in _leaves():
            if not any(leaf.startswith(f"{key}.") for leaf in _leaves()):
                raise _unknown(key, value)
            yield from _flatten({str(k): v for k, v in value.items()}, f"{key}.")
        else:
            yield key, value


def _assign(tree: DictConfig, key: str, value: object) -> None:
    """Set one leaf, or say why not."""
    if key not in _leaves():
        inside = [leaf for leaf in _leaves() if leaf.startswith(f"{key}.")]
        if inside:
            raise ConfigError(
                key, value, "is a section, not a setting", f"set {any_of(inside[:4])}"
            )
        raise _unknown(key, value)
    try:
        OmegaConf.update(tree, key, value)
    except _REFUSALS as error:
        raise _wrong_type(key, value) from error


def _to_object(tree: DictConfig) -> Config:
    try:
        config = OmegaConf.to_object(tree)
    except _REFUSALS as error:
        key = getattr(error, "full_key", None) or "config"
        value = OmegaConf.to_container(tree, resolve=False)
        for part in key.split("."):
            value = value.get(part, "") if isinstance(value, dict) else value
        problem = f"cannot be resolved: {(str(error).splitlines() or ['too deep'])[0]}"
        raise ConfigError(key, value, problem, "write the value itself") from error
    assert isinstance(config, Config)
    for key, value in leaves(config):
        if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
            raise ConfigError(key, value, "is not Unicode text", "write it in UTF-8")
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ConfigError(key, value, f"is over {LONGEST_TEXT} characters", "write less")
        if isinstance(value, list) and {*map(type, value)} - {*typing.get_args(_leaves()[key])}:
            raise _wrong_type(key, value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(key, value, "does not fit in 64 bits", f"set {key} to a usual number")
    return config


def _unknown(key: str, value: object) -> ConfigError:
    close = close_keys(key)
    fix = f"did you mean {any_of(close)}?" if close else "see configs/schema.py for all settings"
    return ConfigError(key, value, "unknown setting", fix)


def close_keys(key: str) -> list[str]:
    """Settings that a mistyped key may mean, the likeliest first, at most three."""
    leaf = key.rpartition(".")[2]
    if leaf in OTHER_NAMES:
        return [OTHER_NAMES[leaf]]
    by_leaf = [full for full in _leaves() if full.rpartition(".")[2] == leaf]
    names = {full.rpartition(".")[2] for full in _leaves()}
    near = difflib.get_close_matches(leaf, sorted(names), n=2, cutoff=0.75)
    by_near = [full for name in near for full in _leaves() if full.endswith(f".{name}")]
    by_full = difflib.get_close_matches(key, list(_leaves()), n=3, cutoff=0.75)
    exact_section = sorted(by_leaf, key=lambda full: full not in by_full)
    return list(dict.fromkeys([*exact_section, *by_full, *by_near]))[:3]


def _wrong_type(key: str, value: object) -> ConfigError:
    expected = _expected(_leaves()[key])
    return ConfigError(key, value, f"wrong type, expected {expected}", f"set {key} to {expected}")


def _expected(hint: object) -> str:
    """A type in words: `an integer`, `one of torch, vllm`."""
    if typing.get_origin(hint) is list:
        texts = typing.get_args(hint) == (str,)
        return 'a list such as ["one", "two"]' if texts else "a list such as [0, 2]"
    options = [t for t in typing.get_args(hint) if t is not type(None)]
    if options:
        return " or ".join([_expected(option) for option in options] + ["null"])
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return words.get(hint, str(hint))  # type: ignore[call-overload]


def _written(key: str, text: str) -> object:
    """None or a list where the setting takes one and the text says so; else the text, for the
    field to parse."""
    hint = _leaves().get(key)
    if typing.get_origin(hint) is list:
        if typing.get_args(hint) == (str,) and not text.startswith("["):
            return [word for word in text.split(",") if word]
        try:
            return json.loads(text or "[]")
        except (ValueError, RecursionError):
            raise _wrong_type(key, text) from None
    optional = type(None) in typing.get_args(hint)
    return None if optional and text.lower() in {"", "null", "none", "~"} else text


@functools.cache
def _leaves(kind: type = Config, prefix: str = "") -> dict[str, object]:
    """Full dotted name → type of every setting."""
    found: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            found |= _leaves(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found[prefix + name] = hint
    return found
