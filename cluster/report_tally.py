"""A summary of a run that has none yet, kept up to date line by line of its metrics."""

import math
from collections import Counter
from typing import Any

from cluster.report_tables import CellSum

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

    def add(self, line: dict[str, Any]) -> None:
        """Take a metrics line."""
        for name, counter in self._counts.items():
            histogram = (line.get(name) or {}).get("histogram") or {}
            for value, count in histogram.items():
                counter[int(value)] += int(count)
        for row in line.get("cells") or []:
            key = (row.get("age"), row.get("reuse"))
            if (cell := self._cells.get(key)) is None:
                cell = self._cells[key] = CellSum(row)
            cell.add(row)
        self._last |= {name: line[name] for name in _LAST if _number(line.get(name))}
        for name, sums in self._sums.items():
            if _number(value := line.get(name, math.nan)):
                sums[0] += value
                sums[1] += 1
        self.lines += 1
        self._line = line

    def summary(self) -> dict[str, Any]:
        """The summary so far."""
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


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and value == value  # no NaN


def _describe(counter: Counter[int]) -> dict[str, Any] | None:
    total = sum(counter.values())
    if not total:
        return None
    mean = sum(value * count for value, count in counter.items()) / total
    return {"mean": mean, "max": max(counter), "histogram": dict(counter)}
