"""The report's tables: age × reuse as one shaded grid per measure, samples and environment."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.wording import ABSENT, number, percent

LIMIT = 12  # rows and columns of a grid, beyond which ages and reuses are binned
SUMMED = ("rollouts", "gradient_share")
Row = dict[str, Any]
Bin = tuple[int, int] | None  # first and last value; None: no age


@dataclass(frozen=True)
class Measure:
    """A column of the age × reuse table. `falls`: less of it is further off-policy."""

    name: str
    title: str
    unit: str
    show: Callable[[object], str] = number
    falls: bool = False


MEASURES = (
    Measure("kl_to_generator", "KL to generator", "KL(π_θ‖π_gen), nats per token"),
    Measure("kl_from_generator", "KL from generator", "KL(π_gen‖π_θ), nats per token"),
    Measure("ess", "ESS", "(Σρ)²/(n·Σρ²), as a fraction of the samples", number, True),
    Measure("clip_fraction", "Clip fraction", "share of ratios outside [1−ε, 1+ε]", percent),
    Measure("gradient_share", "Gradient share", "share of Σ|∂loss/∂log π|", percent),
    Measure("rollouts", "Rollouts", "consumptions by the learner"),
)


@dataclass(frozen=True)
class Shade:
    """One cell: its text, and how strongly it is shaded, from 0 to 1."""

    text: str
    heat: float


@dataclass(frozen=True)
class Grid:
    """One measure over ages (rows) and reuses (columns); None where no sample fell."""

    measure: Measure
    columns: list[str]
    rows: list[tuple[str, list[Shade | None]]]


class CellSum:
    """Cells put together: counts and gradient share added, the rest weighted by rollouts."""

    def __init__(self, first: Row) -> None:
        self._row: Row = {"age": first.get("age"), "reuse": first.get("reuse")}
        self._sums: dict[str, list[float]] = {}  # total and weight of what is known

    def add(self, rows: Sequence[Row]) -> None:
        """Take cells, the first one too."""
        rollouts = np.nan_to_num(numbers([row.get("rollouts") or 0 for row in rows]))
        for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
            if name in self._row:
                continue
            values = numbers([row.get(name) for row in rows])
            known = np.isfinite(values)
            weights = np.where(known, 1.0 if name in SUMMED else rollouts, 0.0)
            sums = self._sums.setdefault(name, [0, 0])
            sums[0] += float(values[known] @ weights[known])
            sums[1] += float(weights.sum())

    def row(self) -> Row:
        """One cell for all; a measure without weight is absent, a sum of nothing None."""
        out = dict(self._row)
        for name, (total, weight) in self._sums.items():
            if name in SUMMED:
                out[name] = total if weight else None
            elif weight:
                out[name] = total / weight
        return out


def merge(rows: Sequence[Row]) -> Row:
    """Cells put together, at the first one's age and reuse."""
    cell = CellSum(rows[0])
    cell.add(rows)
    return cell.row()


def numbers(values: Sequence[object]) -> np.ndarray:
    """Values as floats; NaN for what is no number, or one of hundreds of digits."""
    if {float, int}.issuperset(map(type, values)):
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=float)
    known = [type(v) is float or (type(v) is int and abs(v) < 2**1000) for v in values]
    return np.array([v if k else np.nan for v, k in zip(values, known)], dtype=float)


def _known(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def grids(cells: Iterable[Row]) -> list[Grid]:
    """A grid for every measure that any cell has."""
    cells = [row for row in cells if isinstance(row, dict) and row.get("reuse") is not None]
    ages = _bins(row.get("age") for row in cells)
    reuses = _bins(row["reuse"] for row in cells)
    held: dict[tuple[Bin, Bin], list[Row]] = {}
    for row in cells:
        place = (_place(row.get("age"), ages), _place(row["reuse"], reuses))
        held.setdefault(place, []).append(row)
    table = {place: merge(rows) for place, rows in held.items()}
    out = []
    for measure in MEASURES:
        if any(_known(row.get(measure.name)) for row in table.values()):
            out.append(_grid(measure, table, ages, reuses))
    return out


def _grid(
    measure: Measure, table: dict[tuple[Bin, Bin], Row], ages: list[Bin], reuses: list[Bin]
) -> Grid:
    values = {place: row.get(measure.name) for place, row in table.items()}
    far = {
        place: (1 - value if measure.falls else value)
        for place, value in values.items()
        if value is not None and _known(value)
    }
    most = max(far.values(), default=0.0)

    def shade(place: tuple[Bin, Bin]) -> Shade | None:
        if place not in table:
            return None
        heat = max(0.0, far.get(place, 0.0) / most) if most > 0 else 0.0
        return Shade(measure.show(values[place]), round(min(heat, 1.0), 3))

    rows = [(_label(age), [shade((age, reuse)) for reuse in reuses]) for age in ages]
    return Grid(measure, [_label(reuse) for reuse in reuses], rows)


def _bins(values: Iterable[int | None], limit: int = LIMIT) -> list[Bin]:
    """A bin a value, or at most `limit` equally wide bins; None, where it occurs, comes first."""
    have = set(values)
    whole = sorted(value for value in have if value is not None)
    bins: list[Bin] = [None] if None in have else []
    if len(whole) <= limit:
        return bins + [(value, value) for value in whole]
    width = -(-(whole[-1] - whole[0] + 1) // limit)
    starts = range(whole[0], whole[-1] + 1, width)
    return bins + [(start, min(start + width - 1, whole[-1])) for start in starts]


def _place(value: int | None, bins: list[Bin]) -> Bin:
    if value is None:
        return None
    return next(bin_ for bin_ in bins if bin_ and bin_[0] <= value <= bin_[1])


def _label(bin_: Bin) -> str:
    if bin_ is None:
        return ABSENT
    return str(bin_[0]) if bin_[0] == bin_[1] else f"{bin_[0]}–{bin_[1]}"


def readable(sample: Row) -> dict[str, str]:
    """A line of samples.jsonl as text: token ids in a row, versions as a range."""
    steps = sample.get("steps") or []
    versions = ABSENT
    if isinstance(steps, list) and steps:
        ends = dict.fromkeys((min(steps), max(steps)))
        versions = "–".join(str(step) for step in ends)
    return {
        "round": str(sample.get("round", ABSENT)),
        "position": str(sample.get("position", ABSENT)),
        "versions": versions,
        "prompt": _words(sample.get("prompt_text", sample.get("prompt"))),
        "response": _words(sample.get("response_text", sample.get("response"))),
        "reward": number(sample.get("reward")),
        "failure": str(sample.get("failure") or ""),
    }


def _words(value: object, limit: int = 4000) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value or ABSENT)
    return text if len(text) <= limit else text[:limit] + " … (cut)"


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested object as (dotted name, value) rows."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += flatten(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", ABSENT if item is None else str(item)))
    return rows
