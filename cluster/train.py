"""A training run: start the parts, let the learner consume, write down what happens.

The driver moves no payload. It asks the learner ranks for a number of batches at a time, writes
their records as metrics, hands versions to the evaluator, and watches over the actors.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.rollout import Version
from cluster import connection, inputs, run_directory, summary
from cluster.metrics import MetricsFile, merge
from cluster.parts import Parts
from cluster.progress import Progress
from cluster.run_directory import RunDirectory
from configs.schema import Config
from learner.cells import StepRecord

CHUNK_SECONDS = 0.5  # of training per call to the learner ranks
FIRST_CHUNK = 4
POLL_SECONDS = 0.5


def train(config: Config, preset: str) -> dict[str, Any]:
    """Run a checked and resolved configuration to its end; returns what summary.json holds.

    Raises ValueError before anything starts where an input cannot be used. A failure later on ends
    the run with status "failed", its reason in the summary.
    """
    started = time.monotonic()
    inputs.check(config)
    directory = run_directory.claim(config, preset)
    with Progress(directory.name, config.learner.updates, describe(config)) as progress:
        progress.message("starting Ray")
        with connection.connected(config.cluster) as own:
            run = Run(config, preset, directory, progress, started, own)
            return run.complete()


def describe(config: Config) -> str:
    """The run in one line."""
    replay = config.replay
    return (
        f"{config.objective.name}, {config.data.source.value}, {replay.schedule.value}, "
        f"B={replay.samples_per_round} C={config.rollout.responses_per_prompt} "
        f"M={config.learner.minibatch} T={replay.inner_epochs}, max_age={replay.max_age}"
    )


class Run:
    """One run's parts and progress."""

    def __init__(
        self, config: Config, preset: str, directory: RunDirectory, progress: Progress,
        started: float, own_cluster: bool,
    ) -> None:  # fmt: skip
        self.config, self.preset, self.directory = config, preset, directory
        self.progress, self.started = progress, started
        self.parts = Parts(config, directory, progress.message, own_cluster)
        self.metrics = MetricsFile(directory.metrics)
        self.tally = summary.Tally()
        self.evaluations: dict[Any, tuple[int, int]] = {}  # call → step, number
        self.evaluated = 0
        self.stop_asked = False

    def complete(self) -> dict[str, Any]:
        """Start, train and finish; whatever happens, the summary is written and nothing is left."""
        status, failure = "failed", None
        with self._stop_on_signals():
            try:
                self._start()
                self._train()
                status = "stopped" if self.stop_asked else "finished"
            except KeyboardInterrupt:
                status = "stopped"
            except Exception as error:
                failure = plain(error)
                self.progress.message(f"failed: {failure}")
            finally:
                out = self._finish(status, failure)
        return out

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop after the batches in hand; a second one at once."""

        def ask(number: int, _: Any) -> None:
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True
            if not self.parts.serving:
                raise KeyboardInterrupt
            self.progress.message(f"{signal.Signals(number).name}: stopping")

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def _start(self) -> None:
        initial = self.parts.start()
        self._evaluate(0, [initial])
        self.parts.serve()
        self.progress.message(f"ready after {time.monotonic() - self.started:.1f} s")
        self.tally.begin()

    def _train(self) -> None:
        asked, rate, asked_at = 0, 0.0, 0.0
        samples = self.directory.samples.open("w", encoding="utf-8")
        pending: list[Any] = []
        with samples:
            while pending or (asked < self.config.learner.updates and not self.stop_asked):
                if not pending:
                    asked, pending = self._ask(asked, rate)
                    asked_at = time.monotonic()
                done, _ = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
                self._watch()
                if self.stop_asked:
                    self.parts.close_queue()
                if len(done) < len(pending):
                    self._raise_failures(done, len(pending) - len(done), asked_at)
                    continue
                ranks = ray.get(pending)
                if len(ranks[0]) < self._chunk:
                    self.stop_asked = True
                rate = self.tally.rate()
                asked, pending = self._ask(asked, rate)
                asked_at = time.monotonic()
                for records in zip(*ranks):
                    self._record(records, samples)
        self._collect_evaluations(self.config.limits.wait_seconds)

    def _ask(self, asked: int, rate: float) -> tuple[int, list[Any]]:
        """The next call to every rank, or none where all is asked for or a stop is."""
        left = self.config.learner.updates - asked
        if left <= 0 or self.stop_asked:
            return asked, []
        self._chunk = min(left, max(FIRST_CHUNK, int(rate * CHUNK_SECONDS)))
        return asked + self._chunk, self.parts.train(self._chunk)

    def _raise_failures(self, done: list[Any], missing: int, asked_at: float) -> None:
        """One rank's failure ends the wait for the others, and so does too long a silence."""
        for call in done:
            ray.get(call)
        allowed = self._chunk * self.config.limits.step_seconds
        if time.monotonic() - asked_at > allowed:
            raise TimeoutError(
                f"{missing} learner rank(s) not back with {self._chunk} batches in {allowed:.0f} s"
            )

    def _watch(self) -> None:
        assert self.parts.fleet is not None
        for line in self.parts.fleet.watch():
            self.progress.message(line)
        self._collect_evaluations(0.0)

    def _record(self, ranks: tuple[StepRecord, ...], samples: Any) -> None:
        first = ranks[0]
        self.tally.add(ranks)
        for sample in first.samples:
            samples.write(json.dumps(sample) + "\n")
        samples.flush()
        if first.stepped:
            line = merge(ranks) | {"skipped_total": self.tally.skipped}
            self._check_mismatch(line)
            self.metrics.add(line, evaluated=first.weights is not None)
            self.progress.update(line)
        else:
            self.progress.message(f"batch {first.batch}: not finite, its step is skipped")
        if first.weights is not None:
            self._evaluate(first.version.step, first.weights)

    def _check_mismatch(self, line: dict[str, Any]) -> None:
        """Law 3: say loudly, once, that weights did not arrive; count the steps that show it."""
        limit, kl = self.config.limits.engine_mismatch_kl, line.get("engine_mismatch_kl")
        if limit is not None and kl is not None and kl > limit:
            self.tally.mismatches += 1
            if self.tally.mismatches == 1:
                self.progress.message(
                    f"WEIGHTS DID NOT ARRIVE: engine_mismatch_kl {kl:.2g} nats/token at step "
                    f"{line['step']}, over limits.engine_mismatch_kl={limit:g}: rollouts were not "
                    "made by the weights whose version they carry"
                )
        line["engine_mismatch_alarms_total"] = self.tally.mismatches

    def _evaluate(self, step: int, weights: list[Any]) -> None:
        call = self.parts.evaluate(Version(0, step), weights[0], self.evaluated)
        self.evaluations[call] = (step, self.evaluated)
        self.evaluated += 1

    def _collect_evaluations(self, seconds: float) -> None:
        calls = list(self.evaluations)
        done, late = ray.wait(calls, num_returns=len(calls), timeout=seconds) if calls else ([], [])
        if late and seconds:
            raise TimeoutError(
                f"no evaluation of step {self.evaluations[late[0]][0]} in {seconds:.0f} s"
            )
        for call in sorted(done, key=lambda c: self.evaluations[c][1]):
            step, _ = self.evaluations.pop(call)
            result = ray.get(call)
            self.tally.evaluated(step, result)
            self.metrics.complete(step, result)
            self.progress.update({"step": step, **result})

    def _finish(self, status: str, failure: str | None) -> dict[str, Any]:
        """Write what there is, end every process of the run."""
        self.tally.end()
        queue, self.tally.actors = self.parts.end_serving()
        if status != "failed" and self.tally.steps:
            self.parts.export(self.tally.steps)
        self.metrics.close()
        out = summary.summarise(
            self.config, self.preset, self.directory.name, status, failure, self.tally, queue,
            time.monotonic() - self.started,
        )  # fmt: skip
        self.directory.write_summary(out)
        self.parts.end()
        self._report()
        self.progress.close()
        return out

    def _report(self) -> None:
        from cluster import report  # matplotlib, which start-up need not wait for

        try:
            report.write(self.directory.path)
        except Exception as error:  # a page that cannot be drawn does not undo a run
            self.progress.message(f"report.html was not written: {plain(error)}")


def plain(error: BaseException) -> str:
    """An error in one line, Ray's wrapping taken off."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:500]
