"""Welch's interval of a difference of two means. numpy has no quantile of Student's t: this has."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cluster.wording import number

LEVEL = 0.95
GRID = 4001  # points of the integral; t is right to six digits


@dataclass(frozen=True)
class Interval:
    """A difference of means, and the ends of its interval of 95%."""

    effect: float
    low: float
    high: float


def interval(more: np.ndarray, less: np.ndarray) -> Interval:
    """The mean of `more` less that of `less`; at least two values each, of any variances.

    Where no value differs from the others in its arm, the interval is a point.
    """
    effect = float(np.mean(more) - np.mean(less))
    parts = np.array([np.var(arm, ddof=1) / len(arm) for arm in (more, less)])
    total = float(parts.sum())
    if total == 0:
        return Interval(effect, effect, effect)
    shares = parts / total  # so that tiny variances do not vanish when squared
    freedom = 1 / float((shares**2 / [len(more) - 1, len(less) - 1]).sum())
    half = t_quantile(freedom) * float(np.sqrt(total))
    return Interval(effect, effect - half, effect + half)


@lru_cache
def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """The t that Student's t with so many (1 or more) degrees of freedom exceeds in size with
    probability 1 − level.

    With t = √freedom · tan θ its density is cos(θ)^(freedom − 1), integrated here by trapezoids.
    """
    freedom = min(freedom, 1e6)
    angles = np.linspace(0, min(np.pi / 2, 12 / np.sqrt(freedom)), GRID)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.r_[0, np.cumsum(density[1:] + density[:-1])]
    return float(np.sqrt(freedom) * np.tan(np.interp(level, mass / mass[-1], angles)))


def standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN for fewer than two values, or one that is not finite."""
    known = len(values) > 1 and np.isfinite(values).all()
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if known else np.nan


def mean_and_error(values: np.ndarray, between: str = " ± ") -> str:
    """The mean and, of two values or more, its standard error to two digits."""
    mean, error = number(float(np.mean(values))), standard_error(values)
    return mean if np.isnan(error) else f"{mean}{between}{number(float(f'{error:.2g}'))}"
