"""Learning rates by successive halving (Jamieson and Talwalkar, arXiv 1502.07943)."""

import math
import statistics
from typing import Any

from cluster.study.spec import Cell, Search, Study
from cluster.study.trial import Outcome, Trial
from cluster.study.trials import Trials

SEED = 1000  # of the search's runs; results are of other seeds
KEEP = 2  # of so many rates one goes on to the next rung


def search(study: Study, trials: Trials) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The rate of each combination of labels that is searched for (`combination`), and a row for
    each run of the search: the combination, rung, rate, updates and score.

    All rates run for a fraction of `Search.updates`; the better half goes on for twice as long,
    from the beginning, `rungs` times in all. A score is what `Search.score` says, and of equal ones
    the lower rate is taken. A failed run has none, and a combination all of whose runs fail has no
    rate: RuntimeError names it.
    """
    spec = study.search
    if spec is None:
        return {}, []
    cells = {combination(study, cell): _at(study, spec, cell) for cell in study.cells}
    rates = {name: sorted(spec.rates) for name in cells}
    rows: list[dict[str, Any]] = []
    for rung in range(spec.rungs):
        updates = _fitting(study, spec.updates >> (spec.rungs - 1 - rung))
        asked = [(n, Trial(cells[n], SEED, r, updates)) for n in cells for r in rates[n]]
        outcomes = trials.run([trial for _, trial in asked], f"search, rung {rung + 1}")
        ranked: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
        for (name, trial), outcome in zip(asked, outcomes):
            score, rate = _score(outcome, spec.score), float(trial.rate or 0.0)
            row = {"rung": rung + 1, "rate": rate, "updates": updates, "score": score}
            rows.append({"for": name, **row, "failure": outcome.failure})
            if score is not None:
                ranked[name].append((score, -rate))
        for name, scored in ranked.items():
            if not scored:
                raise RuntimeError(f"study {study.name}: no learning rate works for {name}")
            most = 1 if rung == spec.rungs - 1 else math.ceil(len(rates[name]) / KEEP)
            rates[name] = [-rate for _, rate in sorted(scored, reverse=True)[:most]]
    return {name: chosen[0] for name, chosen in rates.items()}, rows


def combination(study: Study, cell: Cell) -> str:
    """The labels of a cell that its learning rate depends on, as text."""
    per = study.search.per if study.search else ()
    return ", ".join(f"{axis} {cell[axis]}" for axis in per) or "all"


def _at(study: Study, spec: Search, cell: Cell) -> Cell:
    """The cell in whose stead the search runs: its own labels of `per`, of the rest `at`'s."""
    first = {axis: next(iter(labels)) for axis, labels in study.axes.items()}
    wanted = {**first, **spec.at, **{axis: cell[axis] for axis in spec.per}}
    return wanted if wanted in study.cells else cell


def _fitting(study: Study, updates: int) -> int:
    """At least one evaluation's worth of updates."""
    return max(updates, 10)


def _score(outcome: Outcome, score: str) -> float | None:
    if outcome.failure:
        return None
    values = [row["reward_eval"] for row in outcome.rows if row["step"]]
    if not values:
        return None
    return float(values[-1] if score == "last" else statistics.fmean(values))
