"""One number of each trial, as `Claim.take` and `Figure.take` say, from a study's evaluations."""

from collections.abc import Iterable, Mapping

import pandas as pd

from cluster.study.spec import Cell, Study
from cluster.wording import number

LAST = 3  # evaluations that `final` is the mean of
COUNTED = {"steps_to": "step", "seconds_to": "seconds", "queries_to": "queries"}


def scalars(
    frame: pd.DataFrame, axes: Iterable[str], metric: str, take: str = "final", level: float = 0.95
) -> pd.DataFrame:
    """A row per trial: its labels of the axes, `seed`, `trial`, `status`, `value` and `reached`.

    Of evaluations where the metric is known. `best` is the greatest; `steps_to`, `seconds_to` and
    `queries_to` are those at the first evaluation of `level` or more, or, where there is none, at
    the last, and `reached` is False. value: NaN where the trial failed or never had the metric.
    """
    trials = frame.drop_duplicates("trial")[[*axes, "seed", "trial", "status"]]
    values: dict[str, float] = {}
    reached: dict[str, bool] = {}
    for trial, rows in frame[frame["status"] == "finished"].groupby("trial"):
        rows = rows.sort_values("step", kind="stable")
        there = rows[metric] >= level if metric in rows else pd.Series(False, rows.index)
        reached[trial] = take not in COUNTED or bool(there.any())
        values[trial] = _of_trial(rows, metric, take, there)
    return trials.assign(
        value=trials["trial"].map(values).astype(float),
        reached=trials["trial"].map(reached).fillna(False).astype(bool),
    ).reset_index(drop=True)


def _of_trial(rows: pd.DataFrame, metric: str, take: str, there: pd.Series) -> float:
    known = rows[metric].dropna() if metric in rows else rows["step"][:0]
    if known.empty:
        return float("nan")
    if take == "final":
        return float(known.tail(LAST).mean())
    if take == "mean":
        return float(known.mean())
    if take == "best":
        return float(known.max())
    counted = rows[COUNTED[take]]
    return float(counted[there].iloc[0] if there.any() else counted.iloc[-1])


def rows_of(frame: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """The rows with these labels of their axes; all rows for no labels."""
    for axis, label in labels.items():
        frame = frame[frame[axis] == label]
    return frame


def labels_of(study: Study, axis: str, where: Cell) -> list[str]:
    """The labels of an axis that have a cell there, in the order of the file."""
    cells = [cell for cell in study.cells if where.items() <= cell.items()]
    return [label for label in study.axes[axis] if any(cell[axis] == label for cell in cells)]


def until(metric: str, level: float = 0.95) -> dict[str, str]:
    """What each take that waits for a level is, in words."""
    said = {"steps_to": "updates", "seconds_to": "seconds", "queries_to": "rewards queried"}
    return {take: f"{what} until {metric} ≥ {number(level)}" for take, what in said.items()}
