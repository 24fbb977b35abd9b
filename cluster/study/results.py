"""A study's trials as one table: a row per evaluation."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cluster.study.trial import Outcome

MEANS = (  # of the updates since the evaluation before
    "reward_mean", "kl_to_generator", "kl_from_generator", "kl_to_reference", "ess", "loss",
    "clip_fraction", "implicit_reward_preferred", "implicit_reward_dispreferred",
)  # fmt: skip
EVALUATED = ("reward_eval", "reward_gold", "eval_kl_to_reference")


def frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Columns: each axis, `seed`, `rate`, `trial`, `status`, `failure`, `step` (0 is before
    training), the metrics of EVALUATED, those of MEANS, and `age`, `age_first` (of rollouts at
    their first use), `reuse`, `seconds` (of training so far, waiting included) and `queries` (of
    the reward so far). A failed trial is one row without metrics."""
    found: list[dict[str, Any]] = []
    for outcome in outcomes:
        trial = outcome.trial
        status = "failed" if outcome.failure else "finished"
        common = {**trial.cell, "seed": trial.seed, "rate": outcome.rate, "status": status,
                  "trial": outcome.folder.name, "failure": outcome.failure}  # fmt: skip
        found += [{**common, **row} for row in outcome.rows or [{}]]
    wanted = ["step", *EVALUATED, *MEANS, "age", "age_first", "reuse", "seconds", "queries"]
    table = pd.DataFrame(found)
    return table.reindex(columns=[*dict.fromkeys([*table.columns, *wanted])])


def rows(folder: Path) -> list[dict[str, Any]]:
    """A finished run's evaluations, that before training first; none where it is unfinished."""
    try:
        known = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if known.get("status") != "finished":
        return []
    first = {"step": 0, "reward_eval": known["reward_initial"], "seconds": 0.0, "queries": 0}
    if known.get("reward_gold_initial") is not None:
        first["reward_gold"] = known["reward_gold_initial"]
    return [first, *evaluations(folder / "metrics.jsonl")]


class Kept:
    """Evaluations of finished trials, by name, in one file that is whole at any time. A disk that
    does not take it costs no trial: its run directory is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, list[dict[str, Any]]] = {}
        with contextlib.suppress(OSError, ValueError):  # none, or none that can be read
            for name, table in pd.read_parquet(path).groupby("trial", sort=False):
                lines = table.drop(columns="trial").to_dict("records")
                self._rows[str(name)] = [{str(k): v for k, v in line.items()} for line in lines]

    def of(self, name: str) -> list[dict[str, Any]]:
        """A trial's; none where it is not there."""
        return self._rows.get(name, [])

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep a trial's, if it has any."""
        if not rows:
            return
        if [row["reward_eval"] for row in self.of(name)] == [row["reward_eval"] for row in rows]:
            return
        self._rows[name] = rows
        beside = self.path.with_suffix(".part")
        every = [{"trial": name, **row} for name, known in self._rows.items() for row in known]
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(every).to_parquet(beside)
            os.replace(beside, self.path)


def evaluations(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one run."""
    window: list[dict[str, Any]] = []
    seconds = queries = 0.0
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        window.append(line)
        seconds += line.get("step_seconds", 0.0)
        queries += _first(line)[1]
        if "reward_eval" not in line:
            continue
        row = {name: line[name] for name in EVALUATED if name in line}
        row |= {name: _mean([w.get(name) for w in window]) for name in MEANS}
        row |= {name: _mean([(w.get(name) or {}).get("mean") for w in window])
                for name in ("age", "reuse")}  # fmt: skip
        ages, counts = zip(*[_first(w) for w in window])
        total = sum(counts)
        row["age_first"] = sum(a * n for a, n in zip(ages, counts)) / total if total else np.nan
        yield {"step": line["step"], **row, "seconds": seconds, "queries": int(queries)}
        window = []


def _first(line: dict[str, Any]) -> tuple[float, int]:
    """Mean age of the rollouts that a step used for the first time, and how many they are."""
    cells = [c for c in line.get("cells", []) if c["reuse"] == 1]
    count = sum(c["rollouts"] for c in cells)
    if not count:
        return 0.0, 0
    return sum((c["age"] or 0) * c["rollouts"] for c in cells) / count, count


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")
