"""The fleet of rollout actors: started, watched, restarted; what they were leased goes back."""

from typing import Any

import ray

from actors.actor import RewardClient, RolloutActor
from actors.dataset_engine import DatasetEngine, DatasetPrompts
from actors.engine import RolloutEngine
from actors.torch_engine import TorchEngine
from cluster import inputs
from configs.schema import Config, EngineKind
from learner.replay.service import ActorQueue


class FleetError(RuntimeError):
    """An actor failed more often than `limits.actor_restarts` allows."""


class RolloutWorker:
    """A rollout actor's process: builds the engine early, serves once it knows whom."""

    def __init__(self, config: Config, index: int, offline_path: str) -> None:
        self.config = config
        self.index = index
        self.offline_path = offline_path
        self.engine: RolloutEngine | None = None
        if not offline_path:
            self.engine = build_engine(config)
            self.prompts: Any = inputs.prompts(config)

    def run(self, queue: Any, rewards: RewardClient) -> dict[str, float]:
        """Serve leases until the run is over; returns the seconds spent on each part."""
        if self.engine is None:
            groups = inputs.offline_data(self.config, self.offline_path)
            self.engine = DatasetEngine(groups, self.config.rollout.temperature)
            self.prompts = DatasetPrompts(groups)
        wait = self.config.limits.wait_seconds
        actor = RolloutActor(
            self.index, self.engine, self.prompts, ActorQueue(queue, wait), rewards, wait
        )
        try:
            return actor.run()
        finally:
            self.engine.close()


def build_engine(config: Config) -> RolloutEngine:
    """The engine that `rollout.engine` names."""
    if config.rollout.engine is EngineKind.torch:
        return TorchEngine(config)
    raise ValueError(f"rollout.engine={config.rollout.engine.value} is not available yet")


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
        remote = ray.remote(RolloutWorker).options(
            num_cpus=resources.actor_cpus, num_gpus=resources.actor_gpus, max_concurrency=2
        )
        return remote.remote(self.config, index, self.offline_path)

    def serve(self, queue: Any, rewards: RewardClient) -> None:
        """Set all actors to work."""
        self.queue, self.rewards = queue, rewards
        for index, worker in self.workers.items():
            self.running[worker.run.remote(queue, rewards)] = index

    def watch(self) -> list[str]:
        """Restart actors that died; returns a line about each. FleetError when it is too often."""
        lines = []
        done, _ = ray.wait(list(self.running), num_returns=max(1, len(self.running)), timeout=0) \
            if self.running else ([], [])  # fmt: skip
        for call in done:
            index = self.running.pop(call)
            try:
                ray.get(call)
            except ray.exceptions.RayError as error:
                lines.append(self._restart(index, error))
        return lines

    def _restart(self, index: int, error: Exception) -> str:
        self.restarts += 1
        why = str(error).strip().splitlines()[-1][:300]
        if self.restarts > self.config.limits.actor_restarts:
            raise FleetError(
                f"rollout actor {index} failed and limits.actor_restarts="
                f"{self.config.limits.actor_restarts} are used up: {why}"
            )
        ray.kill(self.workers[index])
        released = ray.get(self.queue.release.remote(index))
        self.workers[index] = self._start(index)
        self.running[self.workers[index].run.remote(self.queue, self.rewards)] = index
        return f"rollout actor {index} restarted, {released} lease(s) issued again: {why}"

    def finish(self, seconds: float) -> dict[int, dict[str, float]]:
        """Wait for actors to see that the run is over; seconds spent per part, by actor."""
        calls = dict(self.running)
        done, _ = (
            ray.wait(list(calls), num_returns=len(calls), timeout=seconds) if calls else ([], [])
        )
        spent = {}
        for call in done:
            try:
                spent[calls[call]] = ray.get(call)
            except ray.exceptions.RayError:
                continue
        return spent
