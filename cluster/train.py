"""A training run: start the parts, let the learner consume, write down what happens.

The driver moves no payload. It asks the learner ranks for a number of batches at a time, writes
their records as metrics, hands versions to the evaluator, and watches over the actors.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.rollout import Version
from cluster import connection, inputs, report, run_directory, summary
from cluster.evaluate import Evaluator
from cluster.fleet import Fleet
from cluster.metrics import MetricsFile, merge
from cluster.progress import Progress
from cluster.run_directory import RunDirectory
from configs.objectives import TABLE
from configs.schema import Config, DataSource
from learner.learner import StepRecord
from learner.replay import service as queue_service
from learner.replay.staleness import plan as make_plan
from learner.worker import LearnerWorker
from reward_server.service import RewardService, deploy

CHUNK_SECONDS = 0.5  # of training per call to the learner ranks
FIRST_CHUNK = 4
POLL_SECONDS = 0.5
EXIT_SECONDS = 10.0


def train(config: Config, preset: str) -> dict[str, Any]:
    """Run a checked and resolved configuration to its end; returns what summary.json holds.

    Raises ValueError before anything starts where an input cannot be used. A failure later on ends
    the run with status "failed", its reason in the summary.
    """
    started = time.monotonic()
    inputs.check(config)
    path = run_directory.plan(config, preset)
    with Progress(path.name, config.learner.updates, describe(config)) as progress:
        progress.message("starting Ray")
        with connection.connected(config.cluster) as own:
            run = Run(config, preset, run_directory.create(path, config), progress, started, own)
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
        self.progress, self.started, self.own_cluster = progress, started, own_cluster
        self.metrics = MetricsFile(directory.metrics)
        self.tally = summary.Tally()
        self.evaluations: dict[Any, tuple[int, int]] = {}  # call → step, number
        self.evaluated = 0
        self.stop_asked = False
        self.queue: Any = None
        self.fleet: Fleet | None = None
        self.rewards: RewardService | None = None
        self.learners: list[Any] = []
        self.evaluator: Any = None

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
            if self.fleet is None or not self.fleet.running:
                raise KeyboardInterrupt
            self.progress.message(f"{signal.Signals(number).name}: stopping")

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def _start(self) -> None:
        config, limits = self.config, self.config.limits
        offline = config.data.source is DataSource.offline
        offline_path = (config.data.path or str(self.directory.offline_data)) if offline else ""
        self.progress.message("starting learner, rollout actors, evaluator and reward service")
        resources = {
            "num_cpus": config.cluster.learner_cpus,
            "num_gpus": config.cluster.learner_gpus,
        }
        learner = ray.remote(LearnerWorker).options(**resources)
        self.learners = [learner.remote(config, rank) for rank in range(config.learner.ranks)]
        self.queue = queue_service.start(
            make_plan(config), config.learner.ranks, TABLE[config.objective.name].min_valid,
            limits.failure_rate, limits.failure_window, limits.wait_seconds,
        )  # fmt: skip
        master = ray.get(self.learners[0].address.remote(), timeout=limits.startup_seconds)
        starts = [worker.start.remote(master, self.queue) for worker in self.learners]
        self.fleet = Fleet(config, offline_path)
        self.evaluator = ray.remote(Evaluator).options(num_cpus=0).remote(config)
        self.rewards = deploy(config.reward, timeout_s=limits.startup_seconds,
                              threads=config.cluster.threads)  # fmt: skip
        if self.rewards.notice:
            self.progress.message(self.rewards.notice)
        initial = ray.get(starts, timeout=limits.startup_seconds)[0][0]
        ready = self.evaluator.start.remote(self.rewards.client, initial)
        ray.get(ready, timeout=limits.startup_seconds)
        if offline and not config.data.path:
            self.progress.message(f"sampling {config.data.prompts} groups from π_ref")
            made = self.evaluator.sample_dataset.remote(initial, offline_path)
            ray.get(made, timeout=limits.startup_seconds)
        self._evaluate(0, [initial])
        self.fleet.serve(self.queue, self.rewards.client)
        self.progress.message(f"ready after {time.monotonic() - self.started:.1f} s")
        self.tally.begin()

    def _train(self) -> None:
        assert self.fleet is not None
        asked, rate = 0, 0.0
        samples = self.directory.samples.open("w", encoding="utf-8")
        pending: list[Any] = []
        with samples:
            while pending or (asked < self.config.learner.updates and not self.stop_asked):
                if not pending:
                    asked, pending = self._ask(asked, rate)
                done, _ = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
                self._watch()
                if len(done) < len(pending):
                    self._raise_first_failure(done)
                    continue
                ranks = ray.get(pending)
                if len(ranks[0]) < self._chunk:
                    self.stop_asked = True
                rate = self.tally.rate()
                asked, pending = self._ask(asked, rate)
                for records in zip(*ranks):
                    self._record(records, samples)
        self._collect_evaluations(self.config.limits.wait_seconds)

    def _ask(self, asked: int, rate: float) -> tuple[int, list[Any]]:
        """The next call to every rank, or none where all is asked for or a stop is."""
        left = self.config.learner.updates - asked
        if left <= 0 or self.stop_asked:
            return asked, []
        self._chunk = min(left, max(FIRST_CHUNK, int(rate * CHUNK_SECONDS)))
        return asked + self._chunk, [w.train.remote(self._chunk) for w in self.learners]

    @staticmethod
    def _raise_first_failure(done: list[Any]) -> None:
        """One rank's failure ends the wait for the others."""
        for call in done:
            ray.get(call)

    def _watch(self) -> None:
        assert self.fleet is not None
        for line in self.fleet.watch():
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
            self.metrics.add(line, evaluated=first.weights is not None)
            self.progress.update(line)
        else:
            self.progress.message(f"batch {first.batch}: not finite, its step is skipped")
        if first.weights is not None:
            self._evaluate(first.version.step, first.weights)

    def _evaluate(self, step: int, weights: list[Any]) -> None:
        call = self.evaluator.evaluate.remote(Version(0, step), weights[0], self.evaluated)
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
        queue_report = self._ask_quietly(lambda: self.queue.report.remote()) or {}
        if self.queue is not None and self.fleet is not None:
            self._ask_quietly(lambda: self.queue.close.remote())
            self.tally.actors = self.fleet.finish(EXIT_SECONDS)
        if status != "failed" and self.tally.steps:
            target = self.directory.checkpoints / f"step-{self.tally.steps}" / "hf"
            for call in [w.export.remote(str(target.resolve())) for w in self.learners]:
                self._ask_quietly(lambda call=call: call)
        self.metrics.close()
        out = summary.summarise(
            self.config, self.preset, self.directory.name, status, failure, self.tally,
            queue_report, time.monotonic() - self.started,
        )  # fmt: skip
        self.directory.write_summary(out)
        if self.rewards is not None:
            self.rewards.shutdown(cluster_too=self.own_cluster)
        if not self.own_cluster:
            self._kill_actors()
        report.write(Path(self.directory.path))
        self.progress.close()
        return out

    def _ask_quietly(self, call: Any) -> Any:
        """An answer from a part that may be gone; None then."""
        try:
            return ray.get(call(), timeout=EXIT_SECONDS)
        except (ray.exceptions.RayError, TimeoutError, AttributeError):
            return None

    def _kill_actors(self) -> None:
        workers = [*self.learners, *(self.fleet.workers.values() if self.fleet else ())]
        for actor in [*workers, self.queue, self.evaluator]:
            if actor is not None:
                ray.kill(actor)


def plain(error: BaseException) -> str:
    """An error in one line, Ray's wrapping taken off."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:500]
