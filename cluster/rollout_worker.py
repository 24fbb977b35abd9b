"""A rollout actor's process: the engine that is asked for, and whom it serves."""

import contextlib
from typing import Any, Protocol, cast

from actors.actor import QueueClient, RewardClient, RolloutActor
from actors.dataset_engine import DatasetEngine, DatasetPrompts
from actors.engine import RolloutEngine
from actors.in_flight import InFlightActor
from actors.turns import Sleeper, TurnTaking
from cluster import inputs
from cluster.monitoring.rewards import timed
from configs import faults
from configs.choices import EngineKind, UpdateKind
from configs.schema import Config
from learner.replay.clients import ActorQueue

MEET_SECONDS = 10.0


class PushedEngine(Protocol):
    """An engine that takes weights from the learner's GPU (`actors.vllm_push`)."""

    def push(self, step: str, payload: dict[str, Any]) -> None: ...


class RolloutWorker:
    """Builds the engine early, serves once it knows whom. Runs as a Ray actor."""

    def __init__(self, config: Config, index: int, offline_path: str, fault_folder: str) -> None:
        faults.install(config.cluster.faults, fault_folder)
        self.config = config
        self.index = index
        self.offline_path = offline_path
        self.engine: RolloutEngine | None = None
        if not offline_path:
            self.engine = build_engine(config)
            self.prompts: Any = inputs.prompts(config)

    def ready(self) -> bool:
        """Answers once the engine is built."""
        return True

    def meet(self, rewards: Any) -> None:
        """Ask the reward service something: Ray Serve is imported here with the handle, and finds
        its replicas, seconds that the first round need not wait for."""
        with contextlib.suppress(Exception):  # a service that fails says so when it is to score
            rewards.describe(timeout_s=MEET_SECONDS)

    def push(self, step: str, payload: dict[str, Any]) -> None:
        """One step of weights that the learner pushes; while `run` runs, in another thread."""
        cast(PushedEngine, self.engine).push(step, payload)

    def run(self, queue: Any, rewards: RewardClient) -> dict[str, float]:
        """Serve leases until the run is over; returns the seconds spent on each part."""
        if self.engine is None:
            groups = inputs.offline_groups(self.config, self.offline_path)
            self.engine = DatasetEngine(groups, self.config.rollout.temperature)
            self.prompts = DatasetPrompts(groups)
        rewards = timed(rewards, self.config, self.index)
        try:
            return self._actor(self.engine, queue, rewards).run()
        finally:
            self.engine.close()

    def _actor(
        self, engine: RolloutEngine, queue: Any, rewards: RewardClient
    ) -> RolloutActor | InFlightActor:
        wait, rollout = self.config.limits.wait_seconds, self.config.rollout
        if rollout.update is UpdateKind.in_flight:
            slots = range(rollout.concurrent_leases + 1)
            queues = [ActorQueue(queue, wait, slot) for slot in slots]
            return InFlightActor(self.index, engine, self.prompts, queues, rewards, wait)
        client: QueueClient = ActorQueue(queue, wait)
        if self.config.cluster.colocated:
            client = TurnTaking(client, cast(Sleeper, engine))
        return RolloutActor(self.index, engine, self.prompts, client, rewards, wait)


def build_engine(config: Config) -> RolloutEngine:
    """The engine that `rollout.engine` names; only its own packages are imported.

    vLLM is an optional install, and an actor that serves offline rows needs no torch.
    """
    if config.rollout.engine is EngineKind.torch:
        from actors.torch_engine import TorchEngine

        return TorchEngine(config)
    from actors.vllm_engine import VllmEngine

    return VllmEngine(config)
