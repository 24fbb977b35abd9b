"""Rewards: what scores a response, and the law that a reward is a number or a stated failure."""

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


class Reward(Protocol):
    """Scores n responses to their prompts, both as token ids. One finite number for each, or raise.

    To make it the reward of a run: `reward.kind=function reward.path=module:function`.
    """

    def __call__(
        self, prompts: list[list[int]], responses: list[list[int]], /
    ) -> Sequence[float] | np.ndarray: ...


@dataclass
class Scores:
    """What became of n responses: a reward, or NaN and the reason in `failures`."""

    reward: np.ndarray  # float32 [n]
    failures: dict[int, str] = field(default_factory=dict)  # index → what went wrong

    @classmethod
    def failed(cls, count: int, why: str) -> "Scores":
        """All of `count` responses failed for one reason."""
        return cls(np.full(count, np.nan, dtype=np.float32), dict.fromkeys(range(count), why))

    def slice(self, start: int, stop: int) -> "Scores":
        """Responses start … stop − 1, numbered from 0."""
        failures = {i - start: why for i, why in self.failures.items() if start <= i < stop}
        return Scores(self.reward[start:stop], failures)


def concatenate(parts: list[Scores]) -> Scores:
    """The parts' responses in order, numbered anew from 0."""
    starts = np.cumsum([0] + [len(part.reward) for part in parts])
    failures: dict[int, str] = {}
    for start, part in zip(starts.tolist(), parts, strict=False):
        failures |= {start + i: why for i, why in part.failures.items()}
    rewards = [part.reward for part in parts] or [np.empty(0, np.float32)]
    return Scores(np.concatenate(rewards), failures)


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


def load(config: RewardConfig, folder: str = "") -> Reward:
    """The reward that the settings name. ValueError says which setting is wrong, and why.

    `folder` is where a user's module may lie beside the usual places; the current folder always is.
    """
    if config.kind == RewardKind.peak:
        return peak(config.centre, config.width)
    return _load_function(config.path, folder)


def describe(config: RewardConfig) -> str:
    """The reward's identity, such as `peak(centre=70, width=10)`."""
    if config.kind == RewardKind.peak:
        return f"peak(centre={config.centre:g}, width={config.width:g})"
    return f"function({config.path})"


def score_safely(reward: Reward, prompts: list[list[int]], responses: list[list[int]]) -> Scores:
    """Score n responses; whatever breaks becomes a stated failure of the responses it concerns.

    A call that raises is split in halves until the culprits stand alone; one that returns a wrong
    count is repeated singly (a half could match it by chance). Either costs at most 3n calls. A
    value that is no finite float32 fails its own response only.
    """
    n = len(responses)
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts for {n} responses")
    scores = Scores(np.full(n, np.nan, dtype=np.float32))
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


def _load_function(path: str, folder: str) -> Reward:
    name, _, attribute = path.partition(":")
    if not (name and attribute.isidentifier() and all(map(str.isidentifier, name.split(".")))):
        raise ValueError(f"reward.path={path!r}: write it as module:function, such as my.module:f")
    places = [place for place in (folder, os.getcwd()) if place and os.path.isdir(place)]
    sys.path += [place for place in places if place not in sys.path]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            where = f"in {folder or os.getcwd()} nor among the installed packages"
            raise ValueError(f"reward.path={path!r}: no module {error.name!r} {where}") from error
        raise ValueError(f"reward.path={path!r}: importing it raised {brief(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.path={path!r}: importing it raised {brief(error)}") from error
    function = getattr(module, attribute, None)
    if function is None:
        at = getattr(module, "__file__", None) or name
        raise ValueError(f"reward.path={path!r}: {at} has no {attribute!r}")
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"reward.path={path!r}: {attribute!r} is a {kind}, not a function")
    return function
