"""A supervised stage as a run: SFT, or a reward model. Its output, `hf/`, is the next one's model.

A stage's directory has config.yaml, environment.json, metrics.jsonl, summary.json, and, finished,
`hf/`. Interrupted, it goes on from its last checkpoint at the next call; finished, it is not done
again.
"""

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster import connection, mirror, run_directory
from cluster.checkpoints import Checkpoints, driver_state
from cluster.interrupts import stopping
from cluster.progress import Progress
from cluster.remote import spawn
from cluster.restarts import reason
from cluster.run_directory import RunDirectory
from cluster.stages.record import SHOWN, StageRecord, data_summary, merge
from configs.errors import ConfigError
from configs.schema import Config
from learner.stages.base import Stage
from learner.stages.plan import (
    SKIPS,
    StageStep,
    learner_settings,
    open_stage,
    steps_per_epoch,
)
from learner.stages.source import Kind, settings

CHUNK_SECONDS = 0.5  # of training per call to the ranks
FIRST_CHUNK = 4
POLL_SECONDS = 0.2
OUTPUT = "hf"
SHARED = ("seed", "policy.path", "policy.revision", "learner.ranks", "learner.zero_stage",
          "learner.precision", "learner.beta1", "learner.beta2")  # fmt: skip


class NotFinite(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


def run_stage(config: Config, kind: Kind, directory: Path) -> dict[str, Any]:
    """Run a stage in a directory, or go on with it; returns what summary.json holds.

    A finished one's summary comes back at once. Raises ValueError before anything starts where an
    input cannot be used, or where the directory was begun with other settings. A failure later on
    ends the stage with status "failed", its reason in the summary.
    """
    mirror.meet(config, directory)
    done = run_directory.finished(directory)
    if done and (directory / OUTPUT).is_dir():
        _finished_alike(config, kind, directory)
        return done
    stage = open_stage(config, kind)
    run_directory.admit(directory, config, _matters(kind))
    directory.mkdir(parents=True, exist_ok=True)
    return _run(config, stage, run_directory.take(directory, config))


def run_named(config: Config, kind: Kind, preset: str) -> dict[str, Any]:
    """Run a stage under `run.dir`, by `run.name`, else the preset's name, the stage's and a number.
    As `cluster.train.train` in all else."""
    stage = open_stage(config, kind)
    mirror.check(config)
    path = run_directory.choose(config, f"{preset}-{kind}", _matters(kind))
    return _run(config, stage, run_directory.take(path, config))


def _matters(kind: Kind) -> run_directory.Matters:
    return lambda key: key in SHARED or key.startswith(f"{kind}.")


def _finished_alike(config: Config, kind: Kind, directory: Path) -> None:
    """ConfigError where a finished stage had other settings than are asked for."""
    changes = run_directory.changed(directory, config, _matters(kind))
    if changes:
        problem = f"{directory} is finished with other settings: {', '.join(changes)}"
        path = settings(config, kind).path
        raise ConfigError(f"{kind}.path", path, problem, "give the same, or remove it")


def _run(config: Config, stage: Stage, directory: RunDirectory) -> dict[str, Any]:
    total = stage.settings.epochs * steps_per_epoch(stage)
    title = f"{stage.kind}, {len(stage.train_k)} examples, {total} steps"
    with Progress(directory.name, total, title, shown=SHOWN) as progress:
        for why, count in stage.dropped.items():
            if count:
                progress.message(f"{count} of {stage.rows} rows are dropped: {why}")
        progress.message("starting Ray")
        kept = mirror.kept(config, directory.path, progress.message)
        with kept, connection.connected(config.cluster):
            return StageRun(config, stage, directory, progress).complete()


class StageRun:
    """A stage's ranks and how far they are. stage: its examples, as every rank reads them."""

    def __init__(
        self, config: Config, stage: Stage, directory: RunDirectory, progress: Progress
    ) -> None:
        self.config, self.stage, self.directory = config, stage, directory
        self.progress, self.say = progress, progress.message
        self.total = learner_settings(config, stage).updates
        self.record = StageRecord(directory.metrics)
        self.checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
        self.output = (directory.path / OUTPUT).resolve()
        self.workers: list[Any] = []
        self.step = self.resumed_at = 0
        self.signal: int | None = None
        self.started = self._saved = time.monotonic()
        self._before = 0.0  # seconds of earlier attempts

    def complete(self) -> dict[str, Any]:
        """Start, train and finish; whatever happens, the summary is written and no rank is left."""
        status, failure = "failed", None
        with stopping(self._on_signal):
            try:
                self._start()
                self._train()
                if self.step == self.total:
                    self._export()
                status = "finished" if self.step == self.total else "stopped"
            except KeyboardInterrupt:
                status = "stopped"
            except Exception as error:
                failure = reason(error)
                self.say(f"failed: {failure}")
            finally:
                self._end()
                out = self._summary(status, failure)
                self.directory.write_summary(out)
        if status == "finished":
            shutil.rmtree(self.directory.checkpoints, ignore_errors=True)
        return out

    def _on_signal(self, number: int) -> bool:
        """Ctrl-C and SIGTERM stop after the steps in hand; a second one at once."""
        again, self.signal = bool(self.signal), self.signal or number
        if again or not self.step:
            return False
        self.say(f"{signal.Signals(number).name}: stopping after a checkpoint")
        return True

    def _start(self) -> None:
        """Start the ranks, from the newest checkpoint that is whole."""
        self.checkpoints.clean()
        begin = self.checkpoints.newest(self.say)
        if begin is not None:
            state = driver_state(begin)
            self.step = self.resumed_at = state["step"]
            self._before = state["seconds"]
            self.say(f"resumed from {begin.name}")
        self.record.resume(self.step if begin else -1)
        self.workers = self._spawn()
        limit = self.config.limits.startup_seconds
        master = self._call("address", limit)[0]
        self._call("start", limit, master, str(begin.resolve()) if begin else "")
        self.say(f"ready after {time.monotonic() - self.started:.1f} s")
        self._saved = time.monotonic()

    def _spawn(self) -> list[Any]:
        resources = self.config.cluster
        return [
            spawn(
                "learner.stages.worker:StageWorker", self.config, self.stage.kind, rank,
                num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus,
            )
            for rank in range(self.config.learner.ranks)
        ]  # fmt: skip

    def _train(self) -> None:
        if not self.record.lines:
            self._note({"step": 0, **self._evaluate()})
        rate = 0.0  # steps per second
        while self.step < self.total and not self.signal:
            began = time.monotonic()
            count = self._until_due(max(1, int(rate * CHUNK_SECONDS)) if rate else FIRST_CHUNK)
            ranks = self._call("train", self.config.limits.step_seconds * count, count)
            rate = len(ranks[0]) / (time.monotonic() - began)
            self._take(list(zip(*ranks)))
            if self.step < self.total and self._good() and (self.signal or self._checkpoint_due()):
                self._checkpoint()

    def _until_due(self, count: int) -> int:
        """So many steps, or as many as there are to the next evaluation or checkpoint."""
        left = [count, self.total - self.step]
        for every in (self.stage.settings.eval_every, self.config.checkpoint.every):
            if every:
                left.append(every - self.step % every)
        return min(left)

    def _take(self, steps: list[tuple[StageStep, ...]]) -> None:
        """Write down the steps that the ranks took. Raises NotFinite after SKIPS skips in a row."""
        for ranks in steps:
            line = merge(ranks, self.stage, self.record.lines[-1].get("skipped_total", 0))
            self.step = line["step"]
            every = self.stage.settings.eval_every
            if self.step == self.total or (every and self.step % every == 0):
                line |= self._evaluate()
            if "skipped" in line:
                self.say(f"step {self.step} is skipped: {line['skipped']}")
            self._note(line)
        last = self.record.lines[-SKIPS:]
        if len(last) == SKIPS and all("skipped" in line for line in last):
            kind, steps_ = self.stage.kind, ", ".join(str(line["step"]) for line in last)
            raise NotFinite(
                f"steps {steps_} in a row were skipped, {last[-1]['skipped']}; "
                f"set {kind}.lr below {self.stage.settings.lr:g}, or look at their rows"
            )

    def _note(self, line: dict[str, Any]) -> None:
        self.record.add(line)
        self.progress.update({**line, "batch": line["step"] - 1} if line["step"] else line)

    def _good(self) -> bool:
        """Whether the last step was taken."""
        return "skipped" not in self.record.lines[-1]

    def _evaluate(self) -> dict[str, float]:
        """Figures of the held-out examples; none where none are held out."""
        if not len(self.stage.held_out_k):
            return {}
        answers = self._call("evaluate", self.config.limits.wait_seconds)
        examples, outputs = (np.concatenate(column) for column in zip(*answers))
        order = np.argsort(examples)  # whatever the ranks
        figures = self.stage.figures(outputs[order], self.stage.weight_n[examples[order]])
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _checkpoint_due(self) -> bool:
        every, seconds = self.config.checkpoint.every, self.config.checkpoint.seconds
        by_time = seconds and time.monotonic() - self._saved >= seconds
        return bool(by_time or (every and self.step % every == 0))

    def _checkpoint(self) -> None:
        part = self.checkpoints.begin(self.step)
        self._call("save", self.config.limits.wait_seconds, str(part.resolve()))
        self.checkpoints.complete(part, {"step": self.step, "seconds": self._seconds()})
        self.checkpoints.prune()
        self._saved = time.monotonic()

    def _export(self) -> None:
        """Write `hf/`, whole or not at all."""
        part = self.output.with_suffix(".part")
        for old in (part, self.output):
            shutil.rmtree(old, ignore_errors=True)
        self._call("export", self.config.limits.startup_seconds, str(part))
        os.rename(part, self.output)

    def _call(self, method: str, seconds: float, *arguments: Any) -> list[Any]:
        """What every rank answers; one rank's failure ends the wait for the others."""
        calls = [worker.call.remote(method, *arguments) for worker in self.workers]
        deadline = time.monotonic() + seconds
        while True:
            done, waiting = ray.wait(calls, num_returns=len(calls), timeout=POLL_SECONDS)
            ray.get(done)
            if not waiting:
                return ray.get(calls)
            if time.monotonic() > deadline:
                raise TimeoutError(f"a rank did not answer to {method} for {seconds:g} s")

    def _end(self) -> None:
        """End every rank."""
        for worker in self.workers:
            ray.kill(worker)

    def _seconds(self) -> float:
        """What the stage took so far, earlier attempts included."""
        return self._before + time.monotonic() - self.started

    def _summary(self, status: str, failure: str | None) -> dict[str, Any]:
        own = {
            "name": self.directory.name,
            "stage": self.stage.kind,
            "status": status,
            "failure": failure,
            "signal": signal.Signals(self.signal).name if self.signal else None,
            "steps": self.step,
            "seconds": self._seconds(),
            "resumed_at": self.resumed_at,
            "model": str(self.output) if status == "finished" else None,
        }
        return own | self.record.summary() | data_summary(self.stage)
