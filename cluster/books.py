"""What a run writes down as it goes: metrics, samples, the tally for its summary."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from cluster import summary, trackers
from cluster.evaluations import Evaluations
from cluster.metrics import MetricsFile, merge
from cluster.monitoring.exporter import Exporter
from cluster.progress import Progress
from cluster.run_directory import RunDirectory
from configs.schema import Config
from learner.cells import StepRecord

MISMATCHES = ("engine_mismatch_kl", "engine_mismatch_probe")


class NotFinite(RuntimeError):
    """Steps were skipped one after the other: another would be, too."""


class Books:
    """The files of one run, the tally, how far it is, and what is exported of it."""

    def __init__(self, config: Config, directory: RunDirectory, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.exporter = Exporter(config)
        self.say: Callable[[str], None] = progress.message
        self.metrics = MetricsFile(
            directory.metrics, trackers.begin(config, directory.metrics.parent)
        )
        self.samples = directory.samples.open("ab")
        self.tally = summary.Tally()
        self.batch = 0  # how many are consumed
        self.lineage = 0

    @property
    def step(self) -> int:
        """Optimizer steps in the weights."""
        return self.tally.steps

    def record(self, ranks: Sequence[StepRecord], totals: dict[str, Any]) -> None:
        """Write down a batch. totals: what else the metrics line has."""
        first = ranks[0]
        self.batch, self.lineage = first.batch + 1, first.version.lineage
        self.tally.add(ranks)
        for sample in first.samples:
            self.samples.write(json.dumps(sample).encode() + b"\n")
        self.samples.flush()
        if not first.stepped:
            self.say(f"batch {first.batch}: not finite, its step is skipped")
            self._check_skipped()
            return
        line = merge(ranks) | totals | {"skipped_total": self.tally.skipped}
        self._check_mismatch(line)
        self.metrics.add(line, evaluated=first.weights is not None)
        self.progress.update(line)
        self.exporter.step(line, self.tally.last_cells)

    def _check_skipped(self) -> None:
        """NotFinite where too many steps in a row were skipped."""
        count, limit = self.tally.skipped_in_a_row, self.config.limits.skipped_steps
        if count >= limit:
            raise NotFinite(
                f"batches {self.batch - count} … {self.batch - 1}: loss or gradient not finite "
                f"{count} times in a row (limits.skipped_steps={limit}); the weights are those of "
                f"step {self.step}, checkpoints stay; lower learner.lr, set learner.max_grad_norm, "
                "or look at the rewards"
            )

    def _check_mismatch(self, line: dict[str, Any]) -> None:
        """Law 3: say loudly, once, that weights did not arrive; count the steps that show it."""
        limit = self.config.limits.engine_mismatch_kl
        seen = {name: line[name] for name in MISMATCHES if name in line}
        worst = max(seen, key=lambda name: seen[name], default=None)
        if limit is not None and worst is not None and seen[worst] > limit:
            self.tally.mismatches += 1
            if self.tally.mismatches == 1:
                self.say(
                    f"WEIGHTS DID NOT ARRIVE: {worst} {seen[worst]:.2g} nats/token at step "
                    f"{line['step']}, over limits.engine_mismatch_kl={limit:g}: rollouts were not "
                    "made by the weights whose version they carry"
                )
        line["engine_mismatch_alarms_total"] = self.tally.mismatches

    def evaluated(self, taken: list[tuple[int, dict[str, Any]]]) -> None:
        """Write down evaluations, (step, result) each."""
        for step, result in taken:
            self.tally.evaluated(step, result)
            self.metrics.complete(step, result)
            self.progress.update({"step": step, **result})
            self.exporter.evaluated(result)

    def state(self, evaluations: Evaluations) -> dict[str, Any]:
        """All of it at a cut, but for evaluations that are still awaited."""
        self.samples.flush()
        return {
            "batch": self.batch,
            "samples_bytes": self.samples.seek(0, 2),
            "tally": self.tally.state(),
            "evaluations": evaluations.asked,
        }

    def complete(
        self, step: int, state: dict[str, Any], evaluations: Evaluations
    ) -> dict[str, Any] | None:
        """The state with the evaluations of steps up to its own; None until they are there."""
        end = self.metrics.end_of(step)
        if end is None or evaluations.awaited(step):
            return None
        known = [list(e) for e in self.tally.evaluations if e[0] <= step]
        tally = state["tally"] | {"evaluations": known}
        return state | {"metrics_bytes": end, "tally": tally}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `complete` gave; what was written since is of steps that are undone."""
        self.batch = state["batch"]
        self.tally.restore(state["tally"])
        self.metrics.cut(self.tally.steps, state["metrics_bytes"])
        self.samples.truncate(state["samples_bytes"])

    def begin(self) -> None:
        """Nothing is done yet: what a run without a checkpoint wrote is of no step that counts."""
        self.metrics.cut(0, 0)
        self.samples.truncate(0)
        self.batch, self.tally = 0, summary.Tally()
        self.tally.begin()

    def close(self) -> None:
        """Write what is held back."""
        self.exporter.close()
        self.metrics.close()
        self.samples.close()
