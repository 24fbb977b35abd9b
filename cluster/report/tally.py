"""A summary of a run that has none yet, kept up to date line by line of its metrics."""

from collections import Counter
from typing import Any

import numpy as np

from cluster.report.tables import CellSum, numbers

AT_ONCE = 500  # lines summed up together
AVERAGED = ("reward_mean", "kl_to_generator", "kl_from_generator", "ess")
_LAST = ("reward_eval", "reward_gold", "kl_to_reference")


class Tally:
    """summary.json's keys, as far as metrics lines tell: means over them, and the last values."""

    def __init__(self) -> None:
        self.lines = 0
        self._line: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        self._sums = {name: [0.0, 0] for name in AVERAGED}
        self._counts: dict[str, Counter[int]] = {"age": Counter(), "reuse": Counter()}
        self._cells: dict[tuple[Any, Any], CellSum] = {}
        self._lines: list[dict[str, Any]] = []  # whose numbers are not added yet
        self._rows: dict[tuple[Any, Any], list[dict[str, Any]]] = {}  # nor their cells

    def add(self, line: dict[str, Any]) -> None:
        """Take a metrics line."""
        for name, counter in self._counts.items():
            histogram = (line.get(name) or {}).get("histogram") or {}
            for value, count in histogram.items():
                counter[int(value)] += int(count)
        for row in line.get("cells") or []:
            self._rows.setdefault((row.get("age"), row.get("reuse")), []).append(row)
        self.lines += 1
        self._line = line
        self._lines.append(line)
        if len(self._lines) >= AT_ONCE:
            self._sum()

    def _sum(self) -> None:
        """Add up the lines taken since the last time: together, which is quicker."""
        for name in (*_LAST, *AVERAGED):
            values = numbers([line.get(name) for line in self._lines])
            values = values[~np.isnan(values)]
            if len(values) and name in _LAST:
                self._last[name] = float(values[-1])
            elif len(values):
                self._sums[name][0] += float(values.sum())
                self._sums[name][1] += len(values)
        for key, rows in self._rows.items():
            if key not in self._cells:
                self._cells[key] = CellSum(rows[0])
            self._cells[key].add(rows)
        self._lines, self._rows = [], {}

    def summary(self) -> dict[str, Any]:
        """The summary so far."""
        self._sum()
        batch = self._line.get("batch")
        retired = self._line.get("retired_total")
        ledger = {
            "in_flight": self._line.get("rollouts_in_flight"),
            "queued": self._line.get("queue_depth"),
            "retired": retired,
        }
        return {
            "updates": batch + 1 if isinstance(batch, int) else self._line.get("step"),
            **{name: self._last.get(name) for name in _LAST},
            "ledger": ledger if retired is not None else None,
            "age": _describe(self._counts["age"]),
            "reuse": _describe(self._counts["reuse"]),
            "cells": [self._share(cell.row()) for cell in self._cells.values()],
            **{name: total / n if n else None for name, (total, n) in self._sums.items()},
        }

    def _share(self, row: dict[str, Any]) -> dict[str, Any]:
        share = row.get("gradient_share")
        return {**row, "gradient_share": None if share is None else share / self.lines}


def _describe(counter: Counter[int]) -> dict[str, Any] | None:
    total = sum(counter.values())
    if not total:
        return None
    mean = sum(value * count for value, count in counter.items()) / total
    return {"mean": mean, "max": max(counter), "histogram": dict(counter)}
