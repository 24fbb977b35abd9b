"""A study's trials: each a run of its own, some at a time, those that are finished kept."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.remote import spawn
from cluster.restarts import reason
from cluster.study.results import Kept, rows
from cluster.study.spec import Study
from cluster.study.trial import Outcome, Trial
from configs.schema import Config


class Trials:
    """Runs trials of a study, `parallel` at a time, in processes that go from one to the next.

    say: takes a line for people. stages: as `Trial.config` has it. Beside `folder`, its runs, their
    evaluations are kept in FOLDER.parquet, so that a study goes on where the runs are not. A trial
    is run anew once both are removed.
    """

    def __init__(
        self, study: Study, folder: Path, parallel: int, say: Callable[[str], None],
        stages: Path | None = None,
    ) -> None:  # fmt: skip
        self.study, self.folder, self.say = study, folder, say
        self.parallel, self.stages = parallel, stages
        self.seconds: list[float] = []  # that trials took here
        self._free: list[Any] = []
        self._kept = Kept(folder.with_suffix(".parquet"))

    def run(self, trials: Sequence[Trial], what: str) -> list[Outcome]:
        """The outcomes, in the order of the trials. A trial that fails is an outcome like others.

        A finished one's run is read again where there is one; no trial runs twice.
        """
        self.seconds.clear()  # of trials of another length
        distinct = dict.fromkeys(trials)
        configs = {t: t.config(self.study, self.folder, self.stages) for t in distinct}
        outcomes = {t: o for t, c in configs.items() if (o := self._there(t, c))}
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
        if there := self._there(trial, config):
            return there
        folder = Path(config.run.dir) / config.run.name
        return Outcome(trial, folder, config.learner.lr, [], failure or "it wrote no summary")

    def _there(self, trial: Trial, config: Config) -> Outcome | None:
        """A finished trial's outcome: from its run directory, or what is kept of it."""
        folder = Path(config.run.dir) / config.run.name
        if found := rows(folder):
            self._kept.add(folder.name, found)
        else:
            found = self._kept.of(folder.name)
        return Outcome(trial, folder, config.learner.lr, found) if found else None

    def _tell(self, what: str, outcome: Outcome, done: int, of: int) -> None:
        """A line about a trial, and how long the rest will take."""
        ended = outcome.failure and f"FAILED: {outcome.failure}"
        ended = ended or f"reward_eval {outcome.rows[-1]['reward_eval']:.3f}"
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
