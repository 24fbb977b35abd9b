"""What a run comes to: the running tally, and summary.json made of it."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from configs.schema import Config
from learner import cells
from learner.cells import StepRecord


class Tally:
    """Sums over a run, and the clock of its training part."""

    def __init__(self) -> None:
        self.cells: cells.Cells = {}
        self.steps = self.skipped = self.batches = 0
        self.skipped_in_a_row = 0
        self.tokens = self.rollouts = 0
        self.mismatches = 0  # steps with an engine mismatch over its limit
        self.probed: float | None = None  # the largest of the probe's mismatches
        self.reward_sum, self.reward_count = 0.0, 0
        self.parts: Counter[str] = Counter()  # seconds of rank 0, by part of an update
        self.last_cells: cells.Cells = {}
        self.evaluations: list[tuple[int, dict[str, Any]]] = []
        self.actors: dict[int, dict[str, float]] = {}
        self._before, self._batches_before = 0.0, 0  # seconds and batches before a resume
        self._began = self._ended = time.monotonic()

    def begin(self) -> None:
        """Training starts now."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Training is over."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(1e-9, self._before + self._ended - self._began)

    def rate(self) -> float:
        """Batches per second since it began, or was restored."""
        return (self.batches - self._batches_before) / max(1e-9, time.monotonic() - self._began)

    def add(self, ranks: Sequence[StepRecord]) -> None:
        """Take all ranks' records of a batch."""
        first = ranks[0]
        self.batches += 1
        self.steps = first.version.step
        self.skipped += not first.stepped
        self.skipped_in_a_row = 0 if first.stepped else self.skipped_in_a_row + 1
        if first.stepped:  # what a skipped batch measured is not finite
            self.last_cells = cells.add(record.cells for record in ranks)
            self.cells = cells.add([self.cells, self.last_cells])
        if (probed := first.queue.get("engine_mismatch_probe")) is not None:
            self.probed = max(probed, self.probed or 0.0)
        self.tokens += first.index["tokens"]
        self.rollouts += first.index["rollouts"]
        if first.index["reward_mean"] is not None:
            self.reward_sum += first.index["reward_mean"] * first.index["rollouts"]
            self.reward_count += first.index["rollouts"]
        self.parts.update(first.seconds)

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for a checkpoint."""
        now = {name: getattr(self, name) for name in _SUMS}
        return now | {
            "cells": _cells_tree(self.cells),
            "last_cells": _cells_tree(self.last_cells),
            "parts": dict(self.parts),
            "evaluations": [list(e) for e in self.evaluations],
            "seconds": self._before + time.monotonic() - self._began,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        for name in _SUMS:
            setattr(self, name, state[name])
        self.cells = _cells_from(state["cells"])
        self.last_cells = _cells_from(state["last_cells"])
        self.parts = Counter(state["parts"])
        self.evaluations = [(step, result) for step, result in state["evaluations"]]
        self._before, self._batches_before = state["seconds"], self.batches
        self._began = time.monotonic()

    def evaluated(self, step: int, result: dict[str, Any]) -> None:
        """Take an evaluation's result."""
        self.evaluations.append((step, result))


_SUMS = (
    "steps", "skipped", "batches", "tokens", "rollouts", "mismatches", "probed", "reward_sum",
    "reward_count", "skipped_in_a_row",
)  # fmt: skip


def _cells_tree(table: cells.Cells) -> list[Any]:
    return [[*cell, sums] for cell, sums in table.items()]


def _cells_from(tree: list[Any]) -> cells.Cells:
    return {(age, reuse): sums for age, reuse, sums in tree}


def summarise(
    config: Config, preset: str, name: str, status: str, failure: str | None, tally: Tally,
    queue: dict[str, Any], wall_seconds: float, recovery: dict[str, Any],
    identities: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """summary.json: KL to the generator is the run's mean, KL to π_ref the last batch's.

    identities: of `reward` and `gold`, the latter empty where there is none.
    """
    whole = cells.finish(cells.total(tally.cells))
    last = cells.finish(cells.total(tally.last_cells))
    results = [result for _, result in tally.evaluations] or [{}]
    ledger = queue.get("ledger")
    issued = ledger["issued"] if ledger else 0
    return {
        "status": status,
        "failure": failure,
        "name": name,
        "preset": preset,
        "seed": config.seed,
        "objective": config.objective.name,
        "updates": tally.steps,
        "skipped": tally.skipped,
        "wall_seconds": wall_seconds,
        "train_seconds": tally.seconds,
        "reward_eval": results[-1].get("reward_eval"),
        "reward_initial": results[0].get("reward_eval"),
        "reward_gold": results[-1].get("reward_gold"),
        "reward_gold_initial": results[0].get("reward_gold"),
        **{name: {"identity": identity} for name, identity in identities.items() if identity},
        "reward_mean": tally.reward_sum / tally.reward_count if tally.reward_count else None,
        "kl_to_generator": whole.get("kl_to_generator"),
        "engine_mismatch_kl": cells.engine_mismatch(tally.cells),
        "engine_mismatch_probe": tally.probed,
        "engine_mismatch_alarms": tally.mismatches,
        "kl_from_generator": whole.get("kl_from_generator"),
        "kl_to_reference": last.get("kl_to_reference"),
        "ess": whole.get("ess"),
        "clip_fraction": whole.get("clip_fraction"),
        "masked_fraction": whole.get("masked_fraction"),
        "age": queue.get("age"),
        "reuse": queue.get("reuse"),
        "ledger": ledger,
        "throughput": {
            "rollouts_per_s": issued / tally.seconds,
            "updates_per_s": tally.batches / tally.seconds,
            "tokens_per_s": tally.tokens / tally.seconds,
        },
        "idle": {
            "actors": queue.get("actor_idle_fraction"),
            "learner": tally.parts["wait"] / tally.parts["all"] if tally.batches else None,
        },
        "seconds_per_update": {
            part: tally.parts[part] / max(1, tally.batches) for part in ("wait", "step", "publish")
        },
        "actor_seconds": tally.actors,
        "recovery": recovery,
        "cells": cells.table(tally.cells),
    }
