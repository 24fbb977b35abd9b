"""The one list of metrics, and the file that has a line of them per optimizer step."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from learner import cells
from learner.cells import StepRecord


class Form(Enum):
    """What a metric is to Prometheus. A window is the steps since the last export."""

    MEAN = auto()  # gauge: over the window, steps weighted by their seconds
    POOLED = auto()  # gauge: of the window's sums per cell, added up
    NEWEST = auto()  # gauge
    WORST = auto()  # gauge: the largest of the window
    SPREAD = auto()  # gauges: mean and max of the window
    EVALUATED = auto()  # gauge: of the newest evaluation
    SETTING = auto()  # gauge: the same throughout the run
    MOMENT = auto()  # gauge: a time
    COUNT = auto()  # counter of what a metrics line has as a total
    CELL = auto()  # by cell only
    CELL_COUNT = auto()  # counter, by cell
    LATENCY = auto()  # histogram, observed where it happens


@dataclass(frozen=True)
class Metric:
    """A metric's name, the same in JSONL, dashboards and docs; its unit; what it says.

    labels: of its series in Prometheus, beside `run`. by_cell: there is `cell_NAME` too, with the
    labels age and reuse.
    """

    name: str
    unit: str
    meaning: str
    form: Form = Form.MEAN
    labels: tuple[str, ...] = ()
    by_cell: bool = False


CELL_LABELS = ("age", "reuse")

# fmt: off
METRICS = (
    Metric("step", "steps", "optimizer steps in the weights", Form.NEWEST),
    Metric("lineage", "", "goes up by one at every restart of the learner", Form.NEWEST),
    Metric("age", "steps", "learner step at consumption − step of the rollout's oldest token",
           Form.SPREAD, ("statistic",)),
    Metric("reuse", "consumptions", "committed consumptions of the rollout, this one included",
           Form.SPREAD, ("statistic",)),
    Metric("cell_rollouts_total", "rollouts",
           "valid rollouts by committed consumption; `rollouts` of the JSONL's cells",
           Form.CELL_COUNT, CELL_LABELS),
    Metric("queue_seconds", "s", "from entering the queue to the first consumption"),
    Metric("kl_to_generator", "nats/token", "KL(π_θ‖π_gen) at π_gen's prefixes",
           Form.POOLED, by_cell=True),
    Metric("engine_mismatch_kl", "nats/token",
           "KL(π_gen‖π_θ) of the age-0 tokens: the engine's numerical floor, if weights arrive",
           Form.WORST),
    Metric("engine_mismatch_probe", "nats/token",
           "mean ρ − 1 − log ρ of learner to engine on the probe text, since the last batch",
           Form.WORST),
    Metric("engine_mismatch_alarms_total", "steps",
           "steps with one of these over limits.engine_mismatch_kl, so far", Form.COUNT),
    Metric("kl_from_generator", "nats/token", "KL(π_gen‖π_θ) at π_gen's prefixes",
           Form.POOLED, by_cell=True),
    Metric("kl_to_reference", "nats/token", "KL(π_θ‖π_ref) at π_gen's prefixes", Form.POOLED),
    Metric("ess", "fraction", "(Σρ)²/(n·Σρ²) of sequence ratios ρ = π_θ/π_gen",
           Form.POOLED, by_cell=True),
    Metric("clip_fraction", "fraction", "ratios outside [1−ε, 1+ε]; PPO only",
           Form.POOLED, by_cell=True),
    Metric("gradient_share", "fraction", "Σ|∂loss/∂log π| of a cell over the whole",
           Form.CELL, by_cell=True),
    Metric("masked_fraction", "fraction", "sequences beyond objective.mask_ratio; where it is set",
           Form.POOLED),
    Metric("implicit_reward_preferred", "nats",
           "log π_θ/π_ref of pairs' winners; not PPO, REINFORCE", Form.POOLED),
    Metric("implicit_reward_dispreferred", "nats", "the same of their losers", Form.POOLED),
    Metric("value_loss", "reward²", "½(V − return)², clipped, of the value head; advantage=gae",
           Form.POOLED),
    Metric("value_explained_variance", "fraction", "1 − var(return − V)/var(return) over tokens",
           Form.POOLED),
    Metric("kl_coefficient", "", "β of the reward's penalty on log π_gen/π_ref; where it is set",
           Form.NEWEST),
    Metric("loss", "", "mean of the objective's terms, with those of value head and kl_loss"),
    Metric("skipped_total", "steps", "skipped so far: not finite", Form.COUNT),
    Metric("reward_mean", "", "mean reward of the minibatch's valid rollouts (training samples)"),
    Metric("reward_eval", "", "mean reward of fresh rollouts of the weights after this step",
           Form.EVALUATED),
    Metric("reward_gold", "", "mean gold reward of those same rollouts; where gold.kind is set",
           Form.EVALUATED),
    Metric("response_length", "tokens", "mean length of the minibatch's responses"),
    Metric("truncated_fraction", "fraction", "responses stopped by the token limit"),
    Metric("queue_depth", "rollouts", "queued when the batch was frozen", Form.NEWEST),
    Metric("queue_budget", "rollouts",
           "the most that the staleness budget lets be queued or in flight; in Prometheus only",
           Form.SETTING),
    Metric("rollouts_in_flight", "rollouts", "leased to actors when the batch was frozen",
           Form.NEWEST),
    Metric("retired_total", "rollouts", "retired so far, by reason", Form.COUNT, ("reason",)),
    Metric("weight_sync_seconds", "s", "reading out and publishing new weights"),
    Metric("checkpoint_stall_seconds", "s", "what a checkpoint took from the step that it ended",
           Form.WORST),
    Metric("actor_restarts_total", "restarts", "of rollout actors, so far", Form.COUNT),
    Metric("reward_latency_seconds", "s",
           "from asking for a lease's rewards to having them; in Prometheus only",
           Form.LATENCY, ("actor",)),
    Metric("step_seconds", "s", "the step's whole time: waiting, training, publishing"),
    Metric("tokens_per_second", "tokens/s", "response tokens consumed over the step's whole time"),
    Metric("learner_idle_fraction", "fraction",
           "share of the step's time spent waiting for a batch"),
    Metric("actor_idle_fraction", "fraction", "share of actors' time spent waiting for a lease",
           Form.NEWEST),
    Metric("stage_heard_timestamp_seconds", "s",
           "Unix time when a stage was last heard of; in Prometheus only", Form.MOMENT, ("stage",)),
)
# fmt: on


def merge(ranks: Sequence[StepRecord]) -> dict[str, Any]:
    """One metrics line from all ranks' records of a batch. Absent inputs leave a metric out."""
    first = ranks[0]
    merged = cells.add(record.cells for record in ranks)
    index, seconds = first.index, first.seconds
    line: dict[str, Any] = {
        "step": first.version.step,
        "lineage": first.version.lineage,
        "batch": first.batch,
        "round": first.round,
        "loss": sum(record.loss for record in ranks),
        "learning_rate": first.rate,
        "kl_coefficient": first.kl_coefficient,
        "age": _histogram(index["age"]),
        "reuse": _histogram(index["reuse"]),
        "reward_mean": index["reward_mean"],
        "response_length": index["response_length"],
        "truncated_fraction": index["truncated_fraction"],
        **cells.finish(cells.total(merged)),
        "engine_mismatch_kl": cells.engine_mismatch(merged),
        **first.queue,
        "weight_sync_seconds": seconds["publish"],
        "checkpoint_stall_seconds": seconds.get("checkpoint") or None,
        "step_seconds": seconds["all"],
        "tokens_per_second": index["tokens"] / seconds["all"],
        "learner_idle_fraction": seconds["wait"] / seconds["all"],
        "cells": cells.table(merged),
    }
    return {name: value for name, value in line.items() if value is not None}


def _histogram(counts: dict[int, int]) -> dict[str, Any] | None:
    total = sum(counts.values())
    if not total:
        return None
    return {
        "mean": sum(value * n for value, n in counts.items()) / total,
        "max": max(counts),
        "histogram": {str(value): n for value, n in counts.items()},
    }


def numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a metrics line; one within an object has a dotted name, as `age.mean`."""
    for name, value in line.items():
        if type(value) is float or type(value) is int:
            yield name, value
        elif type(value) is dict:
            for inner, number in value.items():
                if type(number) is float or type(number) is int:
                    yield f"{name}.{inner}", number


class Tracker(Protocol):
    """Whoever is given the lines, too, once they are whole."""

    def add(self, line: dict[str, Any]) -> None:
        """Take the next step's line."""

    def cut(self, step: int) -> None:
        """The steps after this one are undone."""

    def close(self) -> None:
        """There is no more."""


class MetricsFile:
    """metrics.jsonl: a line per optimizer step, in order.

    A step that is being evaluated is held back, with those after it, until its result is there.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self._file: BinaryIO = path.open("ab")
        self._lines: list[dict[str, Any]] = []
        self._awaited: set[int] = set()
        self._ends: list[tuple[int, int]] = [(0, 0)]  # step, and where the file ended after it

    def add(self, line: dict[str, Any], evaluated: bool) -> None:
        """Take a step's line; `evaluated` ones wait for `complete`."""
        self._lines.append(line)
        if evaluated:
            self._awaited.add(line["step"])
        self._write()

    def complete(self, step: int, evaluation: dict[str, Any]) -> None:
        """Add a step's evaluation to its line, if one awaits it."""
        for line in self._lines:
            if line["step"] == step:
                line.update(evaluation)
        self._awaited.discard(step)
        self._write()

    def _write(self) -> None:
        ready = 0
        while ready < len(self._lines) and self._lines[ready]["step"] not in self._awaited:
            line = self._lines[ready]
            self._file.write(json.dumps(line).encode() + b"\n")
            self._ends.append((line["step"], self._file.tell()))
            for tracker in self._trackers:
                tracker.add(line)
            ready += 1
        if ready:
            del self._lines[:ready]
            self._file.flush()

    def end_of(self, step: int) -> int | None:
        """Bytes of the file up to this step; None while its line, or one before, is held back."""
        if self._lines and self._lines[0]["step"] <= step:
            return None
        before = [i for i, (known, _) in enumerate(self._ends) if known <= step]
        del self._ends[: before[-1]]  # no earlier one is asked for again
        return self._ends[0][1]

    def cut(self, step: int, size: int) -> None:
        """Back to where the file ended after this step."""
        self._lines, self._awaited = [], set()
        self._file.truncate(size)
        self._file.seek(size)
        self._ends = [(step, size)]
        for tracker in self._trackers:
            tracker.cut(step)

    def close(self) -> None:
        """Write what is held back, evaluated or not."""
        self._awaited.clear()
        self._write()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
