"""The one list of metrics, and the file that has a line of them per optimizer step."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from learner import cells
from learner.cells import StepRecord


@dataclass(frozen=True)
class Metric:
    """A metric's name, the same in JSONL, dashboards and docs; its unit; what it says."""

    name: str
    unit: str
    meaning: str


METRICS = (
    Metric("age", "steps", "learner step at consumption − step of the rollout's oldest token"),
    Metric("reuse", "consumptions", "committed consumptions of the rollout, this one included"),
    Metric("queue_seconds", "s", "from entering the queue to the first consumption"),
    Metric("kl_to_generator", "nats/token", "KL(π_θ‖π_gen) at π_gen's prefixes"),
    Metric(
        "engine_mismatch_kl",
        "nats/token",
        "KL(π_gen‖π_θ) of the age-0 tokens: the engine's numerical floor, if weights arrive",
    ),
    Metric(
        "engine_mismatch_probe",
        "nats/token",
        "mean ρ − 1 − log ρ of learner to engine on the probe text, since the last batch at most",
    ),
    Metric("kl_from_generator", "nats/token", "KL(π_gen‖π_θ) at π_gen's prefixes"),
    Metric("kl_to_reference", "nats/token", "KL(π_θ‖π_ref) at π_gen's prefixes"),
    Metric("ess", "fraction", "(Σρ)²/(n·Σρ²) of sequence ratios ρ = π_θ/π_gen"),
    Metric("clip_fraction", "fraction", "ratios outside [1−ε, 1+ε]; PPO only"),
    Metric("masked_fraction", "fraction", "sequences beyond objective.mask_ratio; where it is set"),
    Metric(
        "implicit_reward_preferred", "nats", "log π_θ/π_ref of pairs' winners; pairwise objectives"
    ),
    Metric("implicit_reward_dispreferred", "nats", "the same of their losers"),
    Metric("value_loss", "reward²", "½(V − return)², clipped, of the value head; advantage=gae"),
    Metric("value_explained_variance", "fraction", "1 − var(return − V)/var(return) over tokens"),
    Metric("kl_coefficient", "", "β of the reward's penalty on log π_gen/π_ref; where it is set"),
    Metric("loss", "", "mean of the objective's terms, with those of value head and kl_loss"),
    Metric("reward_mean", "", "mean reward of the minibatch's valid rollouts (training samples)"),
    Metric("reward_eval", "", "mean reward of fresh rollouts of the weights after this step"),
    Metric("reward_gold", "", "mean gold reward of those same rollouts; where gold.kind is set"),
    Metric("response_length", "tokens", "mean length of the minibatch's responses"),
    Metric("truncated_fraction", "fraction", "responses stopped by the token limit"),
    Metric("queue_depth", "rollouts", "queued when the batch was frozen"),
    Metric("rollouts_in_flight", "rollouts", "leased to actors when the batch was frozen"),
    Metric("retired_total", "rollouts", "retired so far, by reason"),
    Metric("weight_sync_seconds", "s", "reading out and publishing new weights"),
    Metric("checkpoint_stall_seconds", "s", "what a checkpoint took from the step that it ended"),
    Metric("actor_restarts_total", "restarts", "of rollout actors, so far"),
    Metric("step_seconds", "s", "the step's whole time: waiting, training, publishing"),
    Metric("tokens_per_second", "tokens/s", "response tokens consumed over the step's whole time"),
    Metric(
        "learner_idle_fraction", "fraction", "share of the step's time spent waiting for a batch"
    ),
    Metric("actor_idle_fraction", "fraction", "share of actors' time spent waiting for a lease"),
)


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


class MetricsFile:
    """metrics.jsonl: a line per optimizer step, in order.

    A step that is being evaluated is held back, with those after it, until its result is there.
    """

    def __init__(self, path: Path) -> None:
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

    def close(self) -> None:
        """Write what is held back, evaluated or not."""
        self._awaited.clear()
        self._write()
        self._file.close()
