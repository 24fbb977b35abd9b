"""Measures as sums per (age, reuse) cell, and the numbers that are made of them.

Sums of micro-batches, ranks and steps add up; `finish` turns them into what is reported.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.rollout import Version

Cell = tuple[int, int]  # age and reuse; age −1 where offline
Sums = dict[str, float]
Cells = dict[Cell, Sums]

PER_TOKEN = ("kl_to_generator", "kl_from_generator", "kl_to_reference")
PER_ROLLOUT = ("kl_to_generator_sequence", "kl_from_generator_sequence")


@dataclass
class StepRecord:
    """What one rank knows of one batch. Sums, so that ranks add up (`cluster.metrics` does)."""

    batch: int
    round: int
    version: Version  # of the weights after it
    stepped: bool
    loss: float  # this rank's share of the mean
    cells: Cells
    index: dict[str, Any]  # of the whole minibatch: age, reuse, reward, length; the same on all
    rate: float
    kl_coefficient: float | None = None  # β of the reward at this step, where there is one
    seconds: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    weights: Any = None  # the new version's weights, where evaluation wants them
    queue: dict[str, Any] = field(default_factory=dict)


def add(tables: Iterable[Cells]) -> Cells:
    """The sums of several micro-batches, ranks or steps together."""
    total: Cells = {}
    for table in tables:
        for cell, sums in table.items():
            into = total.setdefault(cell, {})
            for name, value in sums.items():
                into[name] = into.get(name, 0.0) + value
    return total


def finish(sums: Sums) -> dict[str, float]:
    """The measures of a cell, or of cells added up; a NaN or absent input leaves its measure out.

    KL per token in nats, and per sequence with the suffix `_sequence`; ESS as a fraction of n.
    """
    out = {name: _ratio(sums, name, "tokens") for name in PER_TOKEN}
    out |= {name: _ratio(sums, name, "rollouts") for name in PER_ROLLOUT}
    out["clip_fraction"] = _ratio(sums, "clipped", "clippable")
    out["masked_fraction"] = _ratio(sums, "masked", "rollouts")
    out["implicit_reward_preferred"] = _ratio(sums, "won_log_ratio", "won")
    out["implicit_reward_dispreferred"] = _ratio(sums, "lost_log_ratio", "lost")
    out["value_loss"] = _ratio(sums, "value_loss", "rollouts")
    out["value_explained_variance"] = _explained(sums)
    if sums.get("rollouts") and sums.get("ratio_squared"):
        out["ess"] = (sums["ratio"] / math.sqrt(sums["ratio_squared"])) ** 2 / sums["rollouts"]
    return {name: value for name, value in out.items() if value is not None and np.isfinite(value)}


def total(cells: Cells) -> Sums:
    """All cells added up."""
    merged = add({(0, 0): sums} for sums in cells.values())
    return merged.get((0, 0), {})


def engine_mismatch(cells: Cells) -> float | None:
    """KL(π_gen‖π_θ) at age 0, nats per token, by k3 over the sampled tokens; None without any.

    There generator and learner have the same weights (a rollout of age 0 has no older token, and
    none can be newer), so all that is left is the numerical floor between engine and learner.
    """
    fresh = total({cell: sums for cell, sums in cells.items() if cell[0] == 0})
    return _ratio(fresh, "sampled_kl_from_generator", "tokens")


def table(cells: Cells) -> list[dict[str, Any]]:
    """The age × reuse table: a row a cell, with its share of the gradient weight."""
    whole = sum(sums.get("gradient_weight", 0.0) for sums in cells.values())
    return [
        {
            "age": None if age < 0 else age,
            "reuse": reuse,
            "rollouts": int(sums["rollouts"]),
            "gradient_share": sums["gradient_weight"] / whole if whole > 0 else None,
            **finish(sums),
        }
        for (age, reuse), sums in sorted(cells.items())
    ]


def _explained(sums: Sums) -> float | None:
    """1 − variance of the values' errors over that of the returns, over tokens; None if they are
    all equal."""
    count = sums.get("tokens", 0.0)
    if "return_squared" not in sums or not count:
        return None

    def variance(name: str) -> float:
        return sums[f"{name}_squared"] / count - (sums[name] / count) ** 2

    spread = variance("return")
    return 1 - variance("value_error") / spread if spread > 1e-12 else None


def _ratio(sums: Sums, name: str, per: str) -> float | None:
    return sums[name] / sums[per] if name in sums and sums.get(per) else None
