"""Small studies and tables of trials with known numbers, as a study's run would leave them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cluster.study.spec import Study

STEPS = (0, 20, 40, 60)


def study(axes: Mapping[str, Sequence[str]], **fields: Any) -> Study:
    """A study of these labels of its axes."""
    values = {
        axis: {label: (f"{axis}={label}",) for label in labels} for axis, labels in axes.items()
    }
    return Study("small", "A <small> study", "bandit_best_of_n", values, **fields)


def rows(cell: Mapping[str, str], seed: int, values: Sequence[float], **columns: Any) -> list[dict]:
    """A finished trial's evaluations: `values` of reward_eval, and other columns as they are."""
    name = "-".join([*cell.values(), str(seed)])
    common = {**cell, "seed": seed, "rate": 1e-3, "trial": name, "status": "finished"}
    return [
        {**common, "step": step, "reward_eval": value, **columns}
        for step, value in zip(STEPS, values)
    ]


def failed(cell: Mapping[str, str], seed: int, why: str = "") -> list[dict[str, Any]]:
    """A failed trial: one row without metrics."""
    name = "-".join([*cell.values(), str(seed)])
    why = {"failure": why} if why else {}
    return [{**cell, "seed": seed, "rate": 1e-3, "trial": name, "status": "failed", **why}]


def table(finals: Mapping[tuple[str, ...], Sequence[float]], axes: Sequence[str]) -> pd.DataFrame:
    """Trials that go from 0 to a value that they stay at: for each cell's labels, one per value."""
    columns = [*axes, "seed", "rate", "trial", "status", "step", "reward_eval"]
    found = [
        row
        for labels, values in finals.items()
        for seed, value in enumerate(values)
        for row in rows(dict(zip(axes, labels)), seed, [0.0, value, value, value])
    ]
    return pd.DataFrame(found, columns=columns)
