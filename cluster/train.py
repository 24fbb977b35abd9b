"""A training run: start the parts, let the learner consume, write down what happens.

The driver moves no rollouts. It asks the learner ranks for a number of batches at a time, writes
their records as metrics, hands versions to the evaluator, watches over the parts, and goes back to
the last checkpoint where the learner dies.
"""

import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.rollout import Version
from cluster import connection, inputs, mirror, run_directory, scorers, summary, trackers
from cluster.books import Books
from cluster.checkpoints import Checkpoints, driver_state
from cluster.crew import Crew
from cluster.interrupts import stopping
from cluster.parts import Parts
from cluster.progress import Progress
from cluster.restarts import Restarts, reason
from cluster.run_directory import RunDirectory
from cluster.saver import Saver
from cluster.startup import Startup
from cluster.watchdog import LearnerLost, Watchdog, is_fatal
from configs import faults
from configs.schema import Config
from learner.cells import StepRecord

CHUNK_SECONDS = 0.5  # of training per call to the learner ranks
FIRST_CHUNK = 4
POLL_SECONDS = 0.5


def train(config: Config, preset: str, crew: Crew | None = None) -> dict[str, Any]:
    """Run a checked and resolved configuration to its end; returns what summary.json holds.

    crew: of processes that runs one after another share; such a run draws no report.
    Raises ValueError before anything starts where an input cannot be used. A failure later on ends
    the run with status "failed", its reason in the summary.
    """
    clock = Startup()
    checked = inputs.check(config)
    trackers.check(config)
    mirror.check(config)
    directory = run_directory.claim(config, preset)
    scorers.keep(directory.path, config)
    clock.mark("inputs")
    with Progress(directory.name, config.learner.updates, describe(config)) as progress:
        for note in checked.notes:
            progress.message(note)
        progress.message("starting Ray")
        kept = mirror.kept(config, directory.path, progress.message)
        with kept, connection.connected(config.cluster) as own:
            clock.mark("ray")
            crew = crew or Crew()
            config = crew.settings(config, directory.name)
            run = Run(config, preset, directory, progress, clock, crew, own)
            run.rows = {path: counts.record() for path, counts in checked.rows.items()}
            return run.complete()


def describe(config: Config) -> str:
    """The run in one line."""
    replay = config.replay
    return (
        f"{config.objective.name}, {config.data.source.value}, {replay.schedule.value}, "
        f"B={replay.samples_per_round} C={config.rollout.responses_per_prompt} "
        f"M={config.learner.minibatch} T={replay.inner_epochs}, max_age={replay.max_age}"
    )


@dataclass(frozen=True)
class _Asked:
    """A call to every rank: how many batches, and the checkpoint that the last one ends."""

    count: int = 0
    folder: str = ""
    calls: list[Any] = field(default_factory=list)


class Run:
    """One run's parts and progress."""

    def __init__(
        self, config: Config, preset: str, directory: RunDirectory, progress: Progress,
        clock: Startup, crew: Crew, own_cluster: bool,
    ) -> None:  # fmt: skip
        faults.install(config.cluster.faults, str(directory.faults.resolve()))
        self.config, self.preset, self.directory = config, preset, directory
        self.progress, self.clock, self.say = progress, clock, progress.message
        self.parts = Parts(config, directory, self.say, crew, own_cluster, clock.mark)
        self.books = Books(config, directory, progress)
        self.checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
        self.saver = Saver(config, self.checkpoints, self.parts, self.say, self._complete_state)
        self.watchdog = Watchdog(config, self.parts, self.saver, directory, self.say)
        self.rows: dict[str, dict[str, int]] = {}  # of the data read, for the summary
        self.resumed_at = 0
        self.signal: int | None = None
        limits = config.limits
        self.restarts = Restarts(
            "the learner", "limits.learner_restarts", limits.learner_restarts,
            limits.backoff_seconds,
        )  # fmt: skip

    def complete(self) -> dict[str, Any]:
        """Start, train and finish; whatever happens, the summary is written and nothing is left."""
        status, failure = "failed", None
        with stopping(self._on_signal):
            try:
                self._start()
                self._train()
                status = "stopped" if self.signal else "finished"
            except KeyboardInterrupt:
                status = "stopped"
            except Exception as error:
                failure = reason(error)
                self.say(f"failed: {failure}")
            finally:
                out = self._finish(status, failure)
        return out

    def _on_signal(self, number: int) -> bool:
        """Ctrl-C and SIGTERM stop after the batches in hand; a second one at once."""
        again, self.signal = bool(self.signal), self.signal or number
        if again or not self.parts.serving:
            return False
        self.say(f"{signal.Signals(number).name}: stopping after a checkpoint")
        return True

    def _start(self) -> None:
        self.checkpoints.clean()
        begin = self.checkpoints.newest(self.say)
        self.resumed_at = self.parts.start(begin)
        if begin is not None:
            self.say(f"resumed from {begin.name}")
            self._take_state(begin)
            self.books.exporter.resumed()
        else:
            self._begin(Version(0, 0), self.parts.current)
        self.parts.serve()
        self.say(f"ready after {self.clock.spent:.1f} s")

    def _begin(self, version: Version, weights: Any) -> None:
        """Nothing is done yet."""
        self.books.begin()
        self.saver.start_over(0)
        self.parts.evaluations.asked = 0
        self.parts.evaluations.ask(version, weights)

    def _checkpoint_now(self) -> None:
        state = self.books.state(self.parts.evaluations)
        self.saver.now(self.books.batch, self.books.step, state)

    def _complete_state(self, step: int, state: dict[str, Any]) -> dict[str, Any] | None:
        return self.books.complete(step, state, self.parts.evaluations)

    def _train(self) -> None:
        lost = ""  # why the learner is to be started again
        while lost or (self.books.batch < self.config.learner.updates and not self.signal):
            try:
                if lost:
                    self._go_back(lost)
                lost = ""
                self._train_lineage()
            except (ray.exceptions.RayError, LearnerLost) as error:
                if self.signal or not self.config.checkpoints or is_fatal(error):
                    raise
                lost = reason(error)
        limit = self.config.limits.wait_seconds
        self.books.evaluated(self.parts.evaluations.wait(limit))
        if self.signal:
            self.saver.wait(limit)
            self._checkpoint_now()
        self.saver.wait(limit)

    def _train_lineage(self) -> None:
        """Ask for batches until all are done or a stop is asked for."""
        self.watchdog.begin()
        asked = self._ask(self.books.batch)
        while asked.calls:
            done, _ = ray.wait(asked.calls, num_returns=len(asked.calls), timeout=POLL_SECONDS)
            self._watch()
            if self.signal:
                self.parts.close_queue()
            if len(done) < len(asked.calls):
                for call in done:  # one rank's failure ends the wait for the others
                    ray.get(call)
                continue
            ranks = ray.get(asked.calls)
            before, asked = asked, self._ask(self.books.batch + len(ranks[0]))
            for records in zip(*ranks):
                self._record(records)
            if len(ranks[0]) == before.count:
                state = self.books.state(self.parts.evaluations)
                self.saver.took(before.folder, self.books.batch, self.books.step, state)

    def _ask(self, batch: int) -> _Asked:
        """The next call to every rank, or none where all is asked for or a stop is."""
        left = self.config.learner.updates - batch
        if left <= 0 or self.signal:
            return _Asked()
        count = min(left, max(FIRST_CHUNK, int(self.books.tally.rate() * CHUNK_SECONDS)))
        folder = self.saver.folder_for(batch + count)
        return _Asked(count, folder, self.parts.train(count, folder))

    def _watch(self) -> None:
        self.books.exporter.heard(self.watchdog.look())
        self.books.evaluated(self.parts.evaluations.take())
        self.saver.poll()

    def _record(self, ranks: tuple[StepRecord, ...]) -> None:
        self.books.record(ranks, {"actor_restarts_total": self.parts.actor_restarts})
        self.clock.mark("first_update")
        if ranks[0].weights is not None:
            self.parts.evaluations.ask(ranks[0].version, ranks[0].weights[0])

    def _go_back(self, why: str) -> None:
        """The learner is gone: all ranks again, from the last checkpoint, under a new lineage."""
        pause = self.restarts.count(why)
        self.say(f"the learner is started again: {why}")
        self.saver.start_over(self.books.batch)
        time.sleep(pause)
        checkpoint = self.checkpoints.newest(self.say)
        restored = self.parts.roll_back(checkpoint, actors_died=False)
        reference, current = self.parts.begun(self.parts.start_learners(restored))
        if checkpoint is None:
            self.parts.evaluations.go_back(-1, reference)
            self._begin(Version(restored[1], 0), current)
        else:
            self._take_state(checkpoint)
            self.parts.evaluations.go_back(self.books.step, reference)
        self.say(f"gone back to batch {self.books.batch}, lineage {restored[1]}")

    def _take_state(self, checkpoint: Path) -> None:
        """The driver's part of a checkpoint."""
        state = driver_state(checkpoint)
        self.books.restore(state)
        self.saver.start_over(self.books.batch)
        self.parts.evaluations.asked = state["evaluations"]

    def _finish(self, status: str, failure: str | None) -> dict[str, Any]:
        """Write what there is, end every process of the run."""
        tally = self.books.tally
        tally.end()
        queue, tally.actors = self.parts.end_serving()
        if status != "failed" and self.books.step:
            self.parts.export(self.books.step)
        self.books.close()
        if status == "finished":
            shutil.rmtree(self.directory.journal, ignore_errors=True)
        out = summary.summarise(
            self.config, self.preset, self.directory.name, status, failure, tally, queue,
            self.clock.spent, self._recovery(), scorers.kept(self.directory.path),
        ) | {"startup": self.clock.record(), "data": self.rows}  # fmt: skip
        self.directory.write_summary(out)
        self.parts.end()
        if not self.parts.crew.keep:
            self._report()
        self.progress.close()
        return out

    def _recovery(self) -> dict[str, Any]:
        """What was brought back, for the summary."""
        return {
            "signal": signal.Signals(self.signal).name if self.signal else None,
            "resumed_at": self.resumed_at,
            "lineage": self.books.lineage,
            "checkpoints": self.saver.written,
            "checkpoint_stall_seconds": self.books.tally.parts["checkpoint"],
            "restarts": {
                "actors": self.parts.actor_restarts,
                "learner": self.restarts.number,
                "evaluator": self.parts.evaluator_restarts,
            },
        }

    def _report(self) -> None:
        from cluster.report import page as report  # matplotlib, which start-up need not wait for

        try:
            report.write(self.directory.path)
        except Exception as error:  # a page that cannot be drawn does not undo a run
            self.say(f"report.html was not written: {reason(error)}")
