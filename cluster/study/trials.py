"""A study's trials: each a run of its own, some at a time, those that are finished kept."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from cluster import pipeline
from cluster.remote import spawn
from cluster.restarts import reason
from cluster.study.spec import Cell, Study
from configs.bounds import leaves
from configs.schema import Config

TRAINING = ["checkpoint.every=0", "checkpoint.seconds=0", "resume=never", "run.samples_per_round=0"]


@dataclass(frozen=True)
class Trial:
    """One run: a cell, a seed, a learning rate; or None for the settings' own, and 0 updates."""

    cell: Cell = field(hash=False)
    seed: int
    rate: float | None = None
    updates: int = 0

    def __str__(self) -> str:
        named = [f"{axis} {label}" for axis, label in self.cell.items()]
        rate = [f"lr {self.rate:g}"] if self.rate is not None else []
        updates = [f"{self.updates} updates"] if self.updates else []
        return ", ".join([*named, f"seed {self.seed}", *rate, *updates])

    def config(self, study: Study, folder: Path, stages: Path | None = None) -> Config:
        """Its settings, with a name made of them, so that equal trials are one run.

        stages: under which the directories of `pipeline.*` are; None: `folder`.
        """
        more = [*TRAINING, f"seed={self.seed}", f"run.dir={folder}"]
        more += [f"learner.lr={self.rate}"] if self.rate is not None else []
        more += [f"learner.updates={self.updates}"] if self.updates else []
        config = study.prepare(self.cell, *more)
        config.run.name, config.run.dir = "", ""
        digest = _digest(config)
        config.run.dir = str((stages or folder).resolve())
        config = pipeline.named(config)
        words = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(self.cell.values())).strip("-")
        config.run.name = f"{words or study.name}-{self.seed}-{digest}"
        config.run.dir = str(folder.resolve())
        return config


@dataclass
class Outcome:
    """How a trial ended. folder: its run directory; failure: why there is no result."""

    trial: Trial
    folder: Path
    rate: float
    summary: dict[str, Any]
    failure: str = ""


class Trials:
    """Runs trials of a study, `parallel` at a time, in processes that go from one to the next.

    say: takes a line for people. stages: as `Trial.config` has it.
    """

    def __init__(
        self, study: Study, folder: Path, parallel: int, say: Callable[[str], None],
        stages: Path | None = None,
    ) -> None:  # fmt: skip
        self.study, self.folder, self.say = study, folder, say
        self.parallel, self.stages = parallel, stages
        self.seconds: list[float] = []  # that trials took here
        self._free: list[Any] = []

    def run(self, trials: Sequence[Trial], what: str) -> list[Outcome]:
        """The outcomes, in the order of the trials. A trial that fails is an outcome like others.

        A finished one's run is read again where there is one; no trial runs twice.
        """
        self.seconds.clear()  # of trials of another length
        distinct = dict.fromkeys(trials)
        configs = {t: t.config(self.study, self.folder, self.stages) for t in distinct}
        outcomes = {t: o for t, c in configs.items() if (o := _kept(t, c))}
        if outcomes:
            self.say(f"{what}: {len(outcomes)} of {len(configs)} trials are there already")
        waiting = [t for t in configs if t not in outcomes]
        running: dict[Any, tuple[Trial, Any, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.parallel:
                trial, runner = waiting.pop(0), self._runner()
                call = runner.call.remote("run", configs[trial], self.study.preset)
                running[call] = trial, runner, time.monotonic()
            done, _ = ray.wait(list(running))
            trial, runner, began = running.pop(done[0])
            outcomes[trial] = self._outcome(trial, configs[trial], done[0], runner)
            self.seconds.append(time.monotonic() - began)
            self._tell(what, outcomes[trial], len(outcomes), len(configs))
        return [outcomes[trial] for trial in trials]

    def _runner(self) -> Any:
        if self._free:
            return self._free.pop()
        options = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        return spawn("cluster.study.runner:TrialRunner", **options)

    def _outcome(self, trial: Trial, config: Config, call: Any, runner: Any) -> Outcome:
        failure = ""
        try:
            failure = ray.get(call)
            self._free.append(runner)
        except ray.exceptions.RayError as error:  # its process died, and its parts with it
            failure = reason(error)
        kept = _kept(trial, config)
        if kept:
            return kept
        folder = Path(config.run.dir) / config.run.name
        return Outcome(trial, folder, config.learner.lr, {}, failure or "it wrote no summary")

    def _tell(self, what: str, outcome: Outcome, done: int, of: int) -> None:
        """A line about a trial, and how long the rest will take."""
        ended = outcome.failure and f"FAILED: {outcome.failure}"
        ended = ended or f"reward_eval {outcome.summary['reward_eval']:.3f}"
        left = sum(self.seconds) / len(self.seconds) * (of - done) / self.parallel
        self.say(
            f"{what} {done}/{of}: {outcome.trial}: {ended}, {self.seconds[-1]:.0f} s; "
            f"{left / 60:.0f} min left"
        )

    def end(self) -> None:
        """End the processes that are kept."""
        calls = [runner.call.remote("end") for runner in self._free]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=30.0)
        for runner in self._free:
            ray.kill(runner)
        self._free.clear()


def _digest(config: Config) -> str:
    """Of the settings that are not the schema's: a setting that is new there keeps old trials."""
    usual = dict(leaves(Config()))
    own = {key: str(value) for key, value in leaves(config) if value != usual[key]}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:10]


def _kept(trial: Trial, config: Config) -> Outcome | None:
    """A finished trial's outcome, from its run directory."""
    folder = Path(config.run.dir) / config.run.name
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if summary.get("status") != "finished":
        return None
    return Outcome(trial, folder, config.learner.lr, summary)
