"""The driver's metrics, given to Ray's metrics agent, from where Prometheus scrapes them.

Every name of `cluster.metrics.METRICS` with the prefix that Ray and we put before it. A step costs
an append: the rest is done once in `cluster.metrics_seconds`, as often as Ray reports. Ray forgets
a gauge that is not set again, so all that are known are, also in a window without a step.
"""

import time
from typing import Any

from ray.util.metrics import Counter, Gauge

from cluster.metrics import CELL_LABELS, METRICS, Form, Metric
from cluster.monitoring import samples
from cluster.monitoring.samples import Line, Sample
from configs.schema import Config
from learner import cells
from learner.replay.staleness import plan

PREFIX = "onpolicy_"  # Ray puts `ray_` before it
HELP = "see METRICS in cluster/metrics.py"  # Ray takes ASCII, which meanings are not
_COUNTERS = (Form.COUNT, Form.CELL_COUNT)


class _Total(Counter):
    """A counter that is there from the start."""

    def begin(self, labels: dict[str, str]) -> None:
        """Export 0, which `inc` refuses."""
        self._record(0.0, labels)


class Exporter:
    """Takes what a run writes down, and exports it with the label `run`.

    Off, with `cluster.metrics_seconds=0`, it does nothing and makes nothing.
    """

    def __init__(self, config: Config) -> None:
        self.every = config.cluster.metrics_seconds
        self._last = 0.0  # when it exported
        self._lines: list[Line] = []
        self._tables: list[cells.Cells] = []
        self._gauges: dict[tuple[Any, ...], float] = {}  # newest value by name and labels
        self._series: dict[str, Gauge | _Total] = {}
        self._counted: dict[tuple[Any, ...], float] = {}  # the totals that are exported
        self._goes_on = False
        if self.every:
            self._begin(config)

    def _begin(self, config: Config) -> None:
        for metric in METRICS:
            self._make(metric, config.run.name)
        for sample in samples.zeros(config):
            series = self._series[sample.name]
            assert isinstance(series, _Total)
            series.begin(dict(sample.labels))
        schedule = plan(config)
        self._know(Sample("queue_budget", (), schedule.most_open * schedule.members))

    def _make(self, metric: Metric, run: str) -> None:
        """The series of a metric, and those of its cells."""
        named = {metric.name: metric.labels} if metric.form is not Form.CELL else {}
        if metric.by_cell:
            named[f"cell_{metric.name}"] = CELL_LABELS
        kind = _Total if metric.form in _COUNTERS else Gauge
        for name, labels in named.items() if metric.form is not Form.LATENCY else ():
            series = kind(PREFIX + name, HELP, ("run", *labels))
            self._series[name] = series.set_default_tags({"run": run})

    def resumed(self) -> None:
        """The run goes on from a checkpoint: what was counted before it is not counted again."""
        self._goes_on = True

    def step(self, line: Line, table: cells.Cells) -> None:
        """A step's metrics line, and its sums by cell."""
        if self.every:
            self._lines.append(line)
            self._tables.append(table)
            self._export_if_due()

    def evaluated(self, result: dict[str, Any]) -> None:
        """An evaluation's result."""
        for metric in METRICS if self.every else ():
            if metric.form is Form.EVALUATED and metric.name in result:
                self._know(Sample(metric.name, (), result[metric.name]))

    def heard(self, status: dict[str, Any]) -> None:
        """The queue's `status`: when each stage was last heard of. An empty one is the driver's."""
        if not self.every:
            return
        silent = {"driver": 0.0}
        if status:
            silent |= {"queue": status["silent"], "learner": status["in_hand"]}
            silent["rollout"] = max(status["actors"].values(), default=0.0)
        now = time.time()
        for metric in METRICS:
            if metric.form is Form.MOMENT:
                (label,) = metric.labels
                for stage, seconds in silent.items():
                    self._know(Sample(metric.name, ((label, stage),), now - seconds))
        self._export_if_due()

    def _export_if_due(self) -> None:
        now = time.monotonic()
        if now - self._last >= self.every:
            self._last = now
            self._export()

    def _export(self) -> None:
        if self._lines:
            table = cells.add(self._tables)
            for sample in samples.gauges(self._lines, table):
                self._know(sample)
            if self._goes_on:
                self._counted = {s[:2]: s.value for s in samples.totals(self._lines[0])}
                self._goes_on = False
            for sample in samples.totals(self._lines[-1]):
                self._count_up_to(sample)
            for sample in samples.increments(table):
                self._count(sample)
        self._lines, self._tables = [], []
        for (name, labels), value in self._gauges.items():
            series = self._series[name]
            assert isinstance(series, Gauge)
            series.set(value, dict(labels))

    def _know(self, sample: Sample) -> None:
        self._gauges[sample[:2]] = float(sample.value)

    def _count(self, sample: Sample) -> None:
        series = self._series[sample.name]
        assert isinstance(series, Counter)
        if sample.value > 0:
            series.inc(float(sample.value), dict(sample.labels))

    def _count_up_to(self, total: Sample) -> None:
        """A counter never falls: what a restart of the learner undid is counted up to again."""
        before = self._counted.get(total[:2], 0.0)
        self._count(total._replace(value=total.value - before))
        self._counted[total[:2]] = max(before, total.value)

    def close(self) -> None:
        """Export what is left; Ray reports it if the process lasts that long."""
        if self.every:
            self._export()
