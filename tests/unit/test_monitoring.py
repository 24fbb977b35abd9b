"""What is exported of a run, and that dashboard and alerts ask for nothing else."""

import itertools
import re
from typing import Any, ClassVar

import pytest
import yaml

from cluster.metrics import METRICS, Form
from cluster.monitoring import dashboard, exporter, samples
from cluster.monitoring.exporter import Exporter
from learner import cells
from learner.replay.staleness import Plan
from tests.harness import settings

LINE = {"step": 1, "lineage": 0, "step_seconds": 1.0, "loss": 1.0, "queue_depth": 100}


def sums(**more: float) -> cells.Sums:
    return {"rollouts": 10.0, "tokens": 100.0, "gradient_weight": 1.0, **more}


def test_a_gauge_is_the_windows_mean_and_longer_steps_count_more():
    lines = [LINE, LINE | {"loss": 4.0, "step_seconds": 2.0, "queue_depth": 50}]
    found = {sample.name: sample.value for sample in samples.gauges(lines, {})}
    assert found["loss"] == 3.0 and found["queue_depth"] == 50 and found["step"] == 1


def test_a_mismatch_in_one_step_of_the_window_is_not_averaged_away():
    lines = [LINE | {"engine_mismatch_kl": nats} for nats in (1e-9, 0.3, 1e-9)]
    found = {sample.name: sample.value for sample in samples.gauges(lines, {})}
    assert found["engine_mismatch_kl"] == 0.3


def test_kl_pools_the_windows_sums_and_is_kept_by_bucketed_cell():
    table = {
        (4, 5): sums(kl_to_generator=1.0),
        (7, 7): sums(kl_to_generator=5.0, gradient_weight=3.0),
        (0, 1): sums(kl_to_generator=0.0, gradient_weight=0.0),
    }
    found = {(s.name, s.labels): s.value for s in samples.gauges([LINE], table)}
    assert found["kl_to_generator", ()] == 6.0 / 300.0
    old, fresh = (("age", "4"), ("reuse", "4")), (("age", "0"), ("reuse", "1"))
    assert found["cell_kl_to_generator", old] == 6.0 / 200.0
    assert found["cell_gradient_share", old] == 1.0 and found["cell_kl_to_generator", fresh] == 0.0


def test_what_a_window_lacks_is_absent_and_never_0():
    names = {sample.name for sample in samples.gauges([LINE], {(-1, 1): sums()})}
    assert names == {*LINE, "cell_gradient_share"}


def test_however_old_and_reused_there_are_at_most_57_cells():
    table = {(age, reuse): sums() for age in range(-1, 300) for reuse in range(1, 200, 7)}
    assert len(samples.bucketed(table)) <= 57
    (count,) = {s.name for s in samples.increments(table)}
    total = sum(s.value for s in samples.increments(table))
    assert count == "cell_rollouts_total" and total == 10 * len(table)


def test_every_counter_that_a_run_can_raise_is_there_at_0_from_the_start():
    config = settings("bandit")
    zeros = {sample[:2] for sample in samples.zeros(config)}
    ages, reuses = range(config.replay.max_age + 1), range(1, config.replay.inner_epochs + 1)
    table = {cell: sums() for cell in itertools.product(ages, reuses)}
    assert {s[:2] for s in samples.increments(table)} <= zeros
    line = {"retired_total": {"exhausted": 1, "reward_failed": 2}, "actor_restarts_total": 3}
    assert {s[:2] for s in samples.totals(line)} <= zeros
    assert {name for name, _ in zeros} == {m.name for m in METRICS if m.name.endswith("_total")}


class Series:
    """A gauge or counter of Ray, that keeps what it is given."""

    made: ClassVar[dict[str, "Series"]] = {}

    def __init__(self, name: str, meaning: str, labels: tuple[str, ...]) -> None:
        self.values: dict[tuple[tuple[str, str], ...], float] = {}
        self.writes = 0
        Series.made[name.removeprefix("onpolicy_")] = self

    def set_default_tags(self, labels: dict[str, str]) -> "Series":
        return self

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values[tuple(labels.items())] = value
        self.writes += 1

    def inc(self, value: float, labels: dict[str, str]) -> None:
        assert value > 0
        self.values[tuple(labels.items())] += value

    def begin(self, labels: dict[str, str]) -> None:
        self.values[tuple(labels.items())] = 0.0


@pytest.fixture
def clock(monkeypatch) -> Any:
    """Seconds, to be set; Ray's series are stand-ins."""

    class Clock:
        now = 100.0

    Series.made = {}
    for kind in ("Gauge", "Counter", "_Total"):
        monkeypatch.setattr(exporter, kind, Series)
    monkeypatch.setattr(exporter.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_thousand_steps_a_second_are_exported_once_in_metrics_seconds(clock):
    out = Exporter(settings("bandit", "cluster.metrics_seconds=10"))
    for step in range(20_000):
        clock.now += 0.001
        out.step(LINE | {"step": step, "loss": float(step)}, {(0, 1): sums()})
    assert Series.made["loss"].writes == 2 and Series.made["cell_gradient_share"].writes == 2
    assert Series.made["queue_budget"].values[()] == 100
    assert Series.made["queue_budget"].writes == 2, "Ray forgets a gauge that is not set again"
    out.close()
    consumed = Series.made["cell_rollouts_total"].values
    assert sum(consumed.values()) == 10 * 20_000, "no step is lost between exports"


def test_a_counter_does_not_fall_where_a_restart_of_the_learner_takes_the_ledger_back(clock):
    out = Exporter(settings("bandit"))
    for retired in (40, 70, 50, 90):
        clock.now += 10.0
        out.step(LINE | {"retired_total": {"exhausted": retired, "expired": 0}}, {})
    assert Series.made["retired_total"].values[("reason", "exhausted"),] == 90
    assert Series.made["retired_total"].values[("reason", "reward_failed"),] == 0


def test_a_resumed_run_counts_from_where_it_goes_on(clock):
    out = Exporter(settings("bandit"))
    out.resumed()
    for retired in (500, 520):
        clock.now += 10.0
        out.step(LINE | {"retired_total": {"exhausted": retired}}, {})
    assert Series.made["retired_total"].values[("reason", "exhausted"),] == 20


def test_stages_that_are_heard_of_leave_the_time_of_it(clock, monkeypatch):
    monkeypatch.setattr(exporter.time, "time", lambda: 1000.0)
    out = Exporter(settings("bandit"))
    out.heard({"silent": 1.0, "in_hand": 2.0, "actors": {0: 0.5, 3: 30.0}})
    clock.now += 10.0
    out.heard({})
    heard = {
        labels[0][1]: when
        for labels, when in Series.made["stage_heard_timestamp_seconds"].values.items()
    }
    assert heard == {"driver": 1000.0, "queue": 999.0, "learner": 998.0, "rollout": 970.0}


def test_with_metrics_off_nothing_is_made(clock):
    out = Exporter(settings("bandit", "cluster.metrics_seconds=0"))
    out.step(LINE, {})
    out.heard({})
    out.evaluated({"reward_eval": 1.0})
    out.close()
    assert Series.made == {}


def plan(lockstep: bool, passes: int, batches: int, max_age: int, lag: int) -> Plan:
    """Rounds of 4 groups in two batches."""
    return Plan(0, 2, 4, 2, passes, batches, 4, lockstep, False, max_age, lag, False, False)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("lag", [0, 1, 5])
@pytest.mark.parametrize("spare", [0, 1, 7, 13])
def test_the_queues_budget_is_what_admission_comes_to(passes, lag, spare):
    """A Plan's `most_open`, against its `admits` at every batch."""
    size = 2 * passes
    p = plan(False, passes, 40 * size, lag + size - 1 + spare, lag)
    most = 0
    for batch in range(20 * size):
        version = max(0, batch - lag)
        first = batch // size
        admitted = [r for r in range(first, p.rounds) if p.admits(r, batch, batch, version)]
        most = max(most, len(admitted))
    assert p.most_open == 4 * most
    assert plan(True, passes, 40 * size, size - 1, 0).most_open == 4


def names(text: str) -> set[str]:
    """Our metrics in a query, without prefix and a histogram's suffix."""
    found = re.findall(r"ray_onpolicy_(\w+)", text)
    return {name.removesuffix("_bucket") for name in found}


def test_the_dashboard_file_is_what_its_table_gives():
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), (
        "run python -m cluster.monitoring.dashboard"
    )


def test_dashboard_and_alerts_ask_only_for_metrics_of_the_list():
    exported = {m.name for m in METRICS if m.form is not Form.CELL}
    exported |= {f"cell_{m.name}" for m in METRICS if m.by_cell}
    alerts = (dashboard.FILE.parents[1] / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    for text in (dashboard.FILE.read_text(encoding="utf-8"), alerts):
        assert names(text) and names(text) <= exported
    rules = yaml.safe_load(alerts)["groups"][0]["rules"]
    assert all(" > " in rule["expr"] for rule in rules)
