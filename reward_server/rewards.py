"""Rewards: what scores a response, and the laws that a reward is a number or a stated failure and
that every score has its scorer's identity."""

import importlib
import math
import numbers
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np

from configs.choices import RewardKind
from configs.schema import RewardConfig
from reward_server import model_files


class Reward(Protocol):
    """Scores n responses to their prompts, both as token ids. One finite number for each, or raise.

    To make it the reward of a run: `reward.kind=function reward.path=module:function`.
    """

    def __call__(
        self, prompts: list[list[int]], responses: list[list[int]], /
    ) -> Sequence[float] | np.ndarray: ...


@dataclass
class Scores:
    """What became of n responses: a reward, or NaN and the reason in `failures`; and whose."""

    reward: np.ndarray  # float32 [n]
    failures: dict[int, str] = field(default_factory=dict)  # index → what went wrong
    identity: str = ""  # of the one reward that all numbers are from; empty where there are none

    @classmethod
    def failed(cls, count: int, why: str) -> "Scores":
        """All of `count` responses failed for one reason."""
        return cls(np.full(count, np.nan, dtype=np.float32), dict.fromkeys(range(count), why))

    def slice(self, start: int, stop: int) -> "Scores":
        """Responses start … stop − 1, numbered from 0."""
        failures = {i - start: why for i, why in self.failures.items() if start <= i < stop}
        return Scores(self.reward[start:stop], failures, self.identity)


def concatenate(parts: list[Scores]) -> Scores:
    """The parts' responses in order, numbered anew from 0; all of one reward."""
    starts = np.cumsum([0] + [len(part.reward) for part in parts])
    failures: dict[int, str] = {}
    for start, part in zip(starts.tolist(), parts, strict=False):
        failures |= {start + i: why for i, why in part.failures.items()}
    rewards = [part.reward for part in parts] or [np.empty(0, np.float32)]
    identities = {part.identity for part in parts}
    assert len(identities) <= 1, identities
    return Scores(np.concatenate(rewards), failures, "".join(identities))


def peak(centre: float, width: float) -> Reward:
    """Mean over the response's tokens a of exp(−((a − centre)/width)²), in (0, 1].

    The bandit's R1 has centre 70 and width 10, R2 has centre 20 (arXiv 2404.14367, Appendix I).
    The prompt does not count; a response without tokens has no reward (ValueError).
    """
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise ValueError(f"reward.centre={centre}, reward.width={width}: finite, and width above 0")

    def score(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        length_N = np.array([len(response) for response in responses], dtype=np.int64)
        if not len(length_N):
            return np.empty(0)
        if not length_N.all():
            raise ValueError("the response is empty, so it has no mean over tokens")
        token_K = np.fromiter(chain.from_iterable(responses), np.float64, int(length_N.sum()))
        height_K = np.exp(-(((token_K - centre) / width) ** 2))
        return np.add.reduceat(height_K, np.cumsum(length_N) - length_N) / length_N

    return score


def length(target: float, scale: float, end_tokens: Sequence[int]) -> Reward:
    """−|L − target|/scale, where L counts a response's tokens before its first end token.

    The gold rewards of the paper's length problems (arXiv 2404.14367, Section 3.2): target 0 for
    Min and Skew Length, whose optimum is a response that is an end token only, and π_ref's mode
    length for Mode Length. The prompt does not count.
    """
    if not (math.isfinite(target) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"reward.target={target}, reward.scale={scale}: finite, and scale above 0")
    ends = frozenset(end_tokens)

    def count(response: list[int]) -> int:
        return next((i for i, token in enumerate(response) if token in ends), len(response))

    def score(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        length_N = np.array([count(response) for response in responses], dtype=np.float64)
        return 0.0 - np.abs(length_N - target) / scale

    return score


def load(config: RewardConfig, folder: str = "", section: str = "reward") -> Reward:
    """The reward that the settings name. ValueError says which setting is wrong, and why.

    `folder` is where a user's module may lie beside the usual places; the current folder always is.
    A model is loaded, which imports torch.
    """
    if config.kind is RewardKind.peak:
        return peak(config.centre, config.width)
    if config.kind is RewardKind.length:
        return length(config.target, config.scale, config.end_tokens)
    if config.kind is RewardKind.function:
        return _load_function(config.path, folder, f"{section}.path={config.path!r}")
    assert config.kind is RewardKind.model, "no reward scores nothing"
    from reward_server.reward_model import RewardModel

    return RewardModel(config)


def check(config: RewardConfig, folder: str = "", section: str = "reward") -> None:
    """ValueError in one line for what `load` would refuse; a model's files are only looked at."""
    if config.kind is RewardKind.model:
        model_files.check(config, section)
    else:
        load(config, folder, section)


def describe(config: RewardConfig) -> str:
    """The reward's identity: kind and parameters, such as `peak(centre=70, width=10)`; of a model
    its name and the hash of its files; empty where there is no reward."""
    if config.kind is RewardKind.none:
        return ""
    if config.kind is RewardKind.peak:
        return f"peak(centre={config.centre:g}, width={config.width:g})"
    if config.kind is RewardKind.length:
        ends = ", ".join(map(str, config.end_tokens))
        return f"length(target={config.target:g}, scale={config.scale:g}, end_tokens=[{ends}])"
    if config.kind is RewardKind.model:
        return model_files.identity(config)
    return f"function({config.path})"


def identify(config: RewardConfig, expected: str) -> str:
    """`describe`; RuntimeError where something else is expected: a model's files have changed, or
    are others on this node. Empty: nothing is expected."""
    found = describe(config)
    if expected and found != expected:
        raise RuntimeError(f"the reward is {found} here, and was {expected} at the run's start")
    return found


class InProcess:
    """A reward without its service, asked in the same way (`actors.actor.RewardClient`)."""

    def __init__(self, config: RewardConfig, folder: str = "", identity: str = "") -> None:
        """Load it; errors as `identify` and `load` have them."""
        self.identity = identify(config, identity)
        self.reward, self.batch = load(config, folder), config.batch

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], timeout_s: float = 0.0
    ) -> Scores:
        """Scores of n responses, at most `batch` a call; there is nothing to wait for."""
        cuts = [slice(i, i + self.batch) for i in range(0, len(responses), self.batch)]
        return concatenate(
            [score_safely(self.reward, prompts[c], responses[c], self.identity) for c in cuts]
        )


def score_safely(
    reward: Reward, prompts: list[list[int]], responses: list[list[int]], identity: str = ""
) -> Scores:
    """Score n responses; whatever breaks becomes a stated failure of the responses it concerns.

    A call that raises is split in halves until the culprits stand alone; one that returns a wrong
    count is repeated singly (a half could match it by chance). Either costs at most 3n calls. A
    value that is no finite float32 fails its own response only.
    """
    n = len(responses)
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts for {n} responses")
    scores = Scores(np.full(n, np.nan, dtype=np.float32), identity=identity)
    pending = [(0, n, "")] if n else []
    while pending:
        start, stop, blame = pending.pop()
        values, why, miscounted = _call(reward, prompts[start:stop], responses[start:stop])
        if not why:
            _enter(scores, start, values)
        elif stop - start > 1 and miscounted:
            pending += [(i, i + 1, why) for i in range(start, stop)]
        elif stop - start > 1:
            middle = (start + stop) // 2
            pending += [(middle, stop, ""), (start, middle, "")]
        else:
            scores.failures[start] = (blame or why) if miscounted else why
    return scores


def brief(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


def _call(reward: Reward, prompts: list, responses: list) -> tuple[list[Any], str, bool]:
    """(values, what went wrong, whether that is their count) of one call."""
    try:
        values: Any = reward(prompts, responses)
        if hasattr(values, "tolist"):  # arrays and tensors
            values = values.tolist()
    except (Exception, SystemExit) as error:  # a user's code; its exit is not the service's
        return [], f"the reward raised {brief(error)}", False
    if not isinstance(values, list | tuple):
        return [], f"the reward returned {type(values).__name__}, not a list of numbers", False
    if len(values) != len(responses):
        count = f"returned {len(values)} rewards for {len(responses)} responses"
        return [], f"the reward {count}", True
    return list(values), "", False


def _enter(scores: Scores, start: int, values: list[Any]) -> None:
    """The values as rewards start, start + 1, …, or as failures."""
    if set(map(type, values)) == {float}:  # the usual case, ten times as fast
        with np.errstate(over="ignore"):
            reward = np.array(values, dtype=np.float32)
        if np.isfinite(reward).all():
            scores.reward[start : start + len(values)] = reward
            return
    for i, value in enumerate(values, start):
        scores.reward[i], problem = _number(value)
        if problem:
            scores.failures[i] = problem


def _number(value: Any) -> tuple[np.float32, str]:
    """(the reward or NaN, what is wrong with it)."""
    nan = np.float32(np.nan)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar tensor in a list
        value = value.item()
    if not isinstance(value, numbers.Real):
        return nan, f"the reward is {type(value).__name__} {str(value)[:40]!r}, not a number"
    try:
        with np.errstate(over="ignore"):
            number = np.float32(float(value))
    except OverflowError:
        number = nan
    if not np.isfinite(number):
        return nan, f"the reward is {str(value)[:40]}, not a finite number"
    return number, ""


def _load_function(path: str, folder: str, named: str) -> Reward:
    """named: the setting, for what is said of it."""
    name, _, attribute = path.partition(":")
    if not (name and attribute.isidentifier() and all(map(str.isidentifier, name.split(".")))):
        raise ValueError(f"{named}: write it as module:function, such as my.module:f")
    places = [place for place in (folder, os.getcwd()) if place and os.path.isdir(place)]
    sys.path += [place for place in places if place not in sys.path]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            where = f"in {folder or os.getcwd()} nor among the installed packages"
            raise ValueError(f"{named}: no module {error.name!r} {where}") from error
        raise ValueError(f"{named}: importing it raised {brief(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{named}: importing it raised {brief(error)}") from error
    function = getattr(module, attribute, None)
    if function is None:
        at = getattr(module, "__file__", None) or name
        raise ValueError(f"{named}: {at} has no {attribute!r}")
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"{named}: {attribute!r} is a {kind}, not a function")
    return function
