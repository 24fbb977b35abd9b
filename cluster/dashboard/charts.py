"""The charts of the live page: which metrics of cluster/metrics.py stand together."""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.metrics import METRICS


@dataclass(frozen=True)
class Chart:
    """A chart over optimizer steps; left out of the page where no run has any of its series.

    A name with a dot is a number within a metric that is an object; `*` stands for all of them.
    """

    title: str
    unit: str
    series: tuple[str, ...]
    remark: str = ""


_TOGETHER = (
    Chart(
        "KL to the generating policy",
        "nats/token",
        ("kl_to_generator", "engine_mismatch_kl", "engine_mismatch_probe"),
        "engine_mismatch_kl is its floor: of age-0 tokens, where only numerics differ",
    ),
    Chart("Reward", "", ("reward_eval", "reward_mean"), "reward_mean: of training samples"),
    Chart("Gold reward", "", ("reward_gold",), "of the evaluation's rollouts, not trained on"),
    Chart("KL to the reference policy", "nats/token", ("kl_to_reference",)),
    Chart("Age", "optimizer steps", ("age.mean", "age.max")),
    Chart("Reuse", "consumptions", ("reuse.mean", "reuse.max")),
    Chart("Effective samples", "fraction", ("ess", "clip_fraction", "masked_fraction")),
    Chart("Loss", "", ("loss",)),
    Chart("Queue", "rollouts", ("queue_depth", "rollouts_in_flight")),
    Chart("Retired", "rollouts so far", ("retired_total.*",)),
    Chart("Throughput", "tokens/s", ("tokens_per_second",)),
    Chart("Idle", "fraction of time", ("learner_idle_fraction", "actor_idle_fraction")),
    Chart(
        "Where a step's time goes",
        "s",
        ("step_seconds", "weight_sync_seconds", "checkpoint_stall_seconds"),
    ),
)


def _named(series: str) -> str:
    return series.split(".")[0]


def _charts() -> tuple[Chart, ...]:
    """Those above, and every other metric by itself."""
    placed = {_named(name) for chart in _TOGETHER for name in chart.series}
    alone = [
        Chart(metric.name, metric.unit, (metric.name,), metric.meaning)
        for metric in METRICS
        if metric.name not in placed
    ]
    return (*_TOGETHER, *alone)


CHARTS = _charts()
_SERIES = {name for chart in CHARTS for name in chart.series}


def shown(names: Iterable[str]) -> list[str]:
    """Those of the names that some chart shows."""
    return [name for name in names if name in _SERIES or f"{_named(name)}.*" in _SERIES]
