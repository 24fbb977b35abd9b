"""The fleet of rollout actors: started, watched, restarted; what they were leased goes back."""

from typing import Any

import ray

from actors.actor import RewardClient
from cluster.remote import spawn
from configs.schema import Config


class FleetError(RuntimeError):
    """An actor failed more often than `limits.actor_restarts` allows."""


class Fleet:
    """Starts `rollout.actors` actors and keeps that many alive."""

    def __init__(self, config: Config, offline_path: str) -> None:
        self.config = config
        self.offline_path = offline_path
        self.restarts = 0
        self.workers = {index: self._start(index) for index in range(config.rollout.actors)}
        self.running: dict[Any, int] = {}

    def _start(self, index: int) -> Any:
        resources = self.config.cluster
        return spawn(
            "cluster.rollout_worker:RolloutWorker", self.config, index, self.offline_path,
            num_cpus=resources.actor_cpus, num_gpus=resources.actor_gpus,
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Until every actor has built its engine; what keeps one from it is raised.

        FleetError names the actors that are not there after `limits.startup_seconds`.
        """
        calls = {worker.call.remote("ready"): index for index, worker in self.workers.items()}
        seconds = self.config.limits.startup_seconds
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=seconds)
        ray.get(done)
        if late:
            missing = ", ".join(str(calls[call]) for call in late)
            raise FleetError(f"rollout actors not ready after {seconds:.0f} s: {missing}")

    def serve(self, queue: Any, rewards: RewardClient) -> None:
        """Set all actors to work."""
        self.queue, self.rewards = queue, rewards
        for index, worker in self.workers.items():
            self.running[worker.call.remote("run", queue, rewards)] = index

    def watch(self) -> list[str]:
        """Restart actors that died; returns a line about each. FleetError when it is too often."""
        lines = []
        for call in _done(self.running, 0.0):
            index = self.running.pop(call)
            try:
                ray.get(call)
            except ray.exceptions.RayError as error:
                lines.append(self._restart(index, error))
        return lines

    def _restart(self, index: int, error: Exception) -> str:
        self.restarts += 1
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        if self.restarts > self.config.limits.actor_restarts:
            raise FleetError(
                f"rollout actor {index} failed and limits.actor_restarts="
                f"{self.config.limits.actor_restarts} are used up: {why}"
            )
        ray.kill(self.workers[index])
        released = ray.get(
            self.queue.release.remote(index), timeout=self.config.limits.wait_seconds
        )
        self.workers[index] = self._start(index)
        again = self.workers[index].call.remote("run", self.queue, self.rewards)
        self.running[again] = index
        return f"rollout actor {index} restarted, {released} lease(s) issued again: {why}"

    def finish(self, seconds: float) -> dict[int, dict[str, float]]:
        """Wait for actors to see that the run is over; seconds spent per part, by actor."""
        calls = dict(self.running)
        spent = {}
        for call in _done(calls, seconds):
            try:
                spent[calls[call]] = ray.get(call)
            except ray.exceptions.RayError:
                continue
        return spent


def _done(calls: dict[Any, int], seconds: float) -> list[Any]:
    """Those of the calls that are done within the time."""
    if not calls:
        return []
    done: list[Any] = ray.wait(list(calls), num_returns=len(calls), timeout=seconds)[0]
    return done
