"""Rules on `reward` and `gold`. Each raises ConfigError with a concrete fix."""

import re

from configs.bounds import Rule
from configs.choices import RewardKind
from configs.errors import ConfigError
from configs.schema import Config, RewardConfig

LARGEST_ID = 2**31 - 1

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def _sections(config: Config) -> tuple[tuple[str, RewardConfig], ...]:
    return ("reward", config.reward), ("gold", config.gold)


def something_is_trained_on(config: Config) -> None:
    """Only `gold` may be left out."""
    if config.reward.kind is RewardKind.none:
        fix = "set reward.kind=peak, length, function or model"
        raise ConfigError("reward.kind", config.reward.kind, "is for gold.kind only", fix)


def reward_path_fits_its_kind(config: Config) -> None:
    """`path` is `module:function` for a function, a model's for a model, else empty."""
    for name, reward in _sections(config):
        key, path = f"{name}.path", reward.path
        if reward.kind is RewardKind.function:
            if not _FUNCTION.fullmatch(path):
                fix = f"set {key}=module:function, e.g. my_rewards:score"
                raise ConfigError(key, path, "is not of the form module:function", fix)
        elif reward.kind is RewardKind.model:
            if not path:
                fix = f"set {key} to a model directory, or to a hub name with {name}.revision"
                raise ConfigError(key, path, f"{name}.kind=model reads a reward model", fix)
        elif path:
            fix = f"set {name}.kind=function or {name}.kind=model, or {key}= to leave it out"
            raise ConfigError(key, path, f"is not read by {name}.kind={reward.kind.name}", fix)


def end_tokens_are_ids(config: Config) -> None:
    """Token ids are integers from 0 that fit in 32 bits."""
    for name, reward in _sections(config):
        if any(not 0 <= token <= LARGEST_ID for token in reward.end_tokens):
            key = f"{name}.end_tokens"
            problem = f"token ids are from 0 to {LARGEST_ID}"
            raise ConfigError(key, reward.end_tokens, problem, f"set {key}=[0] or the like")


def gold_has_no_service(config: Config) -> None:
    """The evaluator scores with gold in its own process."""
    for name in ("replicas", "port"):
        value, usual = getattr(config.gold, name), getattr(RewardConfig(), name)
        if value != usual:
            key = f"gold.{name}"
            problem = "gold is scored by the evaluator, not served"
            raise ConfigError(key, value, problem, f"set {key}={usual}")


REWARD_RULES: tuple[Rule, ...] = (
    something_is_trained_on,
    reward_path_fits_its_kind,
    end_tokens_are_ids,
    gold_has_no_service,
)
