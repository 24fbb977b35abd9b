"""From a window of metrics lines to what is exported of it: pure functions over the one list.

A window is the steps since the last export. Within a round age, reuse and KL rise and fall, so
that a single step seen every ten seconds would mislead; measures are therefore taken over the
window as a whole.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cluster.metrics import CELL_LABELS, METRICS, Form
from configs.schema import Config
from learner import cells
from learner.replay.ledger import REASONS

LARGEST = 64  # bucket of ages and reuses
OFFLINE = "none"  # the age of what has none
Line = dict[str, Any]


class Sample(NamedTuple):
    """A value of a series."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def bucket(value: int) -> int:
    """The bucket of an age or a reuse, by its least value: 0, 1, 2, 4, 8, … LARGEST."""
    return min(LARGEST, 1 << (value.bit_length() - 1)) if value > 0 else 0


def bucketed(table: cells.Cells) -> cells.Cells:
    """Cells of buckets, so that there are 8 × 7 at the most; age −1, offline, is its own."""
    return cells.add(
        {(bucket(age) if age >= 0 else age, bucket(reuse)): sums}
        for (age, reuse), sums in table.items()
    )


def gauges(lines: Sequence[Line], table: cells.Cells) -> Iterator[Sample]:
    """Gauges of a window. lines: of at least one step; table: its sums by cell.

    A metric that no line of the window has is left out.
    """
    pooled = cells.finish(cells.total(table))
    for metric in METRICS:
        name = metric.name
        seen = [line for line in lines if line.get(name) is not None]
        if metric.form is Form.POOLED and name in pooled:
            yield Sample(name, (), pooled[name])
        if not seen:
            continue
        if metric.form is Form.MEAN:
            yield Sample(name, (), _mean([(line[name], line["step_seconds"]) for line in seen]))
        elif metric.form is Form.NEWEST:
            yield Sample(name, (), seen[-1][name])
        elif metric.form is Form.WORST:
            yield Sample(name, (), max(line[name] for line in seen))
        elif metric.form is Form.SPREAD:
            spans = [(line[name]["mean"], line["step_seconds"]) for line in seen]
            yield Sample(name, (("statistic", "mean"),), _mean(spans))
            largest = max(line[name]["max"] for line in seen)
            yield Sample(name, (("statistic", "max"),), largest)
    yield from _by_cell(table)


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    whole = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / whole


def _by_cell(table: cells.Cells) -> Iterator[Sample]:
    for row in cells.table(bucketed(table)):
        labels = _cell(row["age"], row["reuse"])
        for metric in METRICS:
            if metric.by_cell and (value := row.get(metric.name)) is not None:
                yield Sample(f"cell_{metric.name}", labels, value)


def _cell(age: int | None, reuse: int) -> tuple[tuple[str, str], ...]:
    values = (OFFLINE if age is None else str(age), str(reuse))
    return tuple(zip(CELL_LABELS, values))


def totals(line: Line) -> Iterator[Sample]:
    """What a metrics line says was counted so far in the run."""
    for metric in METRICS:
        value = line.get(metric.name) if metric.form is Form.COUNT else None
        if isinstance(value, dict):
            (label,) = metric.labels
            for key, count in value.items():
                yield Sample(metric.name, ((label, key),), count)
        elif value is not None:
            yield Sample(metric.name, (), value)


def increments(table: cells.Cells) -> Iterator[Sample]:
    """What a window adds to the counters by cell."""
    for metric in METRICS:
        if metric.form is Form.CELL_COUNT:
            for row in cells.table(bucketed(table)):
                yield Sample(metric.name, _cell(row["age"], row["reuse"]), row["rollouts"])


def zeros(config: Config) -> Iterator[Sample]:
    """Every counter's series, at 0: a rate needs to know where a count began."""
    for metric in METRICS:
        if metric.form is Form.COUNT:
            for why in REASONS if metric.labels else ("",):
                yield Sample(metric.name, (("reason", why),) if why else (), 0.0)
        elif metric.form is Form.CELL_COUNT:
            for labels in _possible_cells(config):
                yield Sample(metric.name, labels, 0.0)


def _possible_cells(config: Config) -> Iterator[tuple[tuple[str, str], ...]]:
    oldest = config.replay.max_age
    ages = [None] if oldest is None else sorted({bucket(age) for age in range(oldest + 1)})
    reuses = sorted({bucket(reuse) for reuse in range(1, config.replay.inner_epochs + 1)})
    for age in ages:
        for reuse in reuses:
            yield _cell(age, reuse)
