"""The evaluator as the driver sees it: asked for versions, brought back when it dies."""

import time
from dataclasses import dataclass
from typing import Any

import ray

from actors.actor import RewardClient
from actors.rollout import Version
from cluster.crew import Crew
from cluster.placement import Placement
from cluster.restarts import Restarts, reason
from configs.schema import Config
from reward_server.rewards import describe


@dataclass
class _Asked:
    """An evaluation under way. weights: a list with them, or a reference, till it is done."""

    version: Version
    number: int
    weights: list[Any]


class Evaluations:
    """Evaluations asked for and not yet taken, in the order of their steps."""

    def __init__(self, config: Config, crew: Crew, placement: Placement) -> None:
        self.config, self.crew, self.placement = config, crew, placement
        limits = config.limits
        self.restarts = Restarts(
            "the evaluator", "limits.evaluator_restarts", limits.evaluator_restarts,
            limits.backoff_seconds,
        )  # fmt: skip
        self._gold = describe(config.gold)
        self.asked = 0  # so far; each has draws of its own
        self._calls: dict[Any, _Asked] = {}
        self._orphan = ""  # how an evaluation's weights went with the learner that owned them
        self._spawn()

    def _spawn(self) -> None:
        resources = self.config.cluster
        self.evaluator = self.crew.spawn(
            "cluster.evaluate:Evaluator", self.config, self._gold,
            num_cpus=resources.evaluator_cpus, num_gpus=resources.evaluator_gpus,
            **self.placement.options("evaluator"),
        )  # fmt: skip
        self._started: Any = None  # the call that gives it what it needs, until it is through
        self._unfit: Exception | None = None

    def start(self, rewards: RewardClient, reference: Any) -> None:
        """Give it the reward service and π_ref's weights. Evaluations queue up behind that."""
        self._rewards, self._reference = rewards, [reference]
        self._since = time.monotonic()
        self._started = self.evaluator.call.remote("start", rewards, reference)

    def sample_dataset(self, reference: Any, path: str) -> None:
        """Have offline data sampled from π_ref, and wait for it."""
        made = self.evaluator.call.remote("sample_dataset", reference, path)
        ray.get(made, timeout=self.config.limits.startup_seconds)

    def ask(self, version: Version, weights: Any) -> None:
        """Evaluate these weights, or what a reference stands for."""
        self._ask(_Asked(version, self.asked, [weights]))
        self.asked += 1

    def _ask(self, asked: _Asked) -> None:
        if not self._calls and self._started is None:
            self._since = time.monotonic()
        weights = asked.weights[0]
        call = self.evaluator.call.remote("evaluate", asked.version, weights, asked.number)
        self._calls[call] = asked

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """(step, result) of what is done. Starts the evaluator anew where it died or hangs."""
        done, late = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0.0) if (
            self._calls) else ([], [])  # fmt: skip
        taken: list[tuple[int, dict[str, Any]]] = []
        for call in sorted(done, key=lambda c: self._calls[c].number):
            try:
                result = ray.get(call)
            except ray.exceptions.RayError as error:
                cause = error if self._up() else self._unfit or error
                if isinstance(cause, ray.exceptions.OwnerDiedError):
                    self._orphan = reason(cause)  # the learner is gone: `go_back` brings another's
                else:
                    self._restart(reason(cause))
                return taken
            taken.append((self._calls.pop(call).version.step, result))
            self._since = time.monotonic()
        if late and (why := self._hangs()):
            self._restart(why)
        return taken

    def _up(self) -> bool:
        """Whether the evaluator has what it needs; `_unfit` is what kept it from that, if known."""
        if self._started is not None and ray.wait([self._started], timeout=0.0)[0]:
            try:
                ray.get(self._started)
            except ray.exceptions.RayError as error:
                self._unfit = error
                return False
            self._started, self._since = None, time.monotonic()
        return self._started is None

    def _hangs(self) -> str:
        """What took too long, if anything, of coming up and then of each evaluation in its turn."""
        limits, spent = self.config.limits, time.monotonic() - self._since
        if not self._up():
            limit = limits.startup_seconds
            return f"not up in {limit:g} s" if spent > limit else ""
        limit, spent = limits.step_seconds, time.monotonic() - self._since
        return f"no evaluation for {limit:g} s" if spent > limit else ""

    def _restart(self, why: str) -> None:
        time.sleep(self.restarts.count(why))
        self._anew()
        waiting, self._calls = list(self._calls.values()), {}
        for asked in waiting:
            self._ask(_Asked(asked.version, asked.number, asked.weights))

    def _anew(self) -> None:
        ray.kill(self.evaluator)
        self._spawn()
        self.start(self._rewards, self._reference[0])

    def awaited(self, step: int) -> bool:
        """Whether an evaluation of this step, or of one before it, is not there yet."""
        return any(asked.version.step <= step for asked in self._calls.values())

    def go_back(self, step: int, reference: Any) -> None:
        """Forget those of later steps, which are undone; the reference's owner is a new one."""
        self._calls = {c: a for c, a in self._calls.items() if a.version.step <= step}
        self._reference, self._orphan = [reference], ""
        if not self._up():
            self._anew()  # what it was to begin with is gone

    def wait(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        """All that are under way, each within so many seconds once the evaluator is up.

        TimeoutError names the step that is missing; RuntimeError: its weights are lost.
        """
        deadline = time.monotonic() + seconds
        taken: list[tuple[int, dict[str, Any]]] = []
        while True:
            found = self.take()
            taken += found
            if not self._calls:
                return taken
            step = min(asked.version.step for asked in self._calls.values())
            if self._orphan:
                raise RuntimeError(f"step {step} cannot be evaluated: {self._orphan}")
            if found or not self._up():
                deadline = time.monotonic() + seconds  # `_hangs` has a limit of its own on that
            if time.monotonic() > deadline:
                raise TimeoutError(f"no evaluation of step {step} in {seconds:.0f} s")
            time.sleep(0.02)
