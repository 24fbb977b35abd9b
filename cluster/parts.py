"""The parts of a run as processes: started together, asked, and ended whatever happened."""

from collections.abc import Callable
from typing import Any

import ray

from actors.rollout import Version
from cluster.fleet import Fleet
from cluster.remote import spawn
from cluster.run_directory import RunDirectory
from configs.objectives import TABLE
from configs.schema import Config, DataSource, EngineKind
from learner.replay import service as queue_service
from learner.replay.staleness import plan
from reward_server.service import RewardService, deploy

EXIT_SECONDS = 10.0
EXPORT_SECONDS = 120.0


class Parts:
    """Learner ranks, replay queue, rollout actors, evaluator and reward service of one run.

    say: takes a line for people. own_cluster: the Ray cluster ends with the run.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, say: Callable[[str], None], own_cluster: bool
    ) -> None:
        self.config, self.directory, self.say = config, directory, say
        self.own_cluster = own_cluster
        self.learners: list[Any] = []
        self.queue: Any = None
        self.evaluator: Any = None
        self.fleet: Fleet | None = None
        self.rewards: RewardService | None = None

    def start(self) -> Any:
        """Bring everything up; returns the reference to version 0's weights."""
        config, limits = self.config, self.config.limits
        offline = config.data.source is DataSource.offline
        offline_path = (config.data.path or str(self.directory.offline_data)) if offline else ""
        self.say("starting learner, rollout actors, evaluator and reward service")
        ranks = self._start_learners()
        self.fleet = Fleet(config, offline_path)
        self.evaluator = spawn("cluster.evaluate:Evaluator", config, num_cpus=0)
        self.rewards = deploy(
            config.reward, f"reward-{self.directory.name}", limits.startup_seconds,
            limits.wait_seconds, config.cluster.threads,
        )  # fmt: skip
        if self.rewards.notice:
            self.say(self.rewards.notice)
        initial = ray.get(ranks, timeout=limits.startup_seconds)[0][0]
        # Not waited for: evaluations queue up behind it, while training begins.
        self.evaluator.call.remote("start", self.rewards.client, initial)
        if offline and not config.data.path:
            self.say(f"sampling {config.data.prompts} groups from π_ref")
            made = self.evaluator.call.remote("sample_dataset", initial, offline_path)
            ray.get(made, timeout=limits.startup_seconds)
        if config.rollout.engine is EngineKind.vllm and not offline:
            self.say("waiting for vLLM, which takes about 30 s to start")
        self.fleet.wait_ready()
        return initial

    def _start_learners(self) -> list[Any]:
        config, limits = self.config, self.config.limits
        resources = config.cluster
        self.learners = [
            spawn(
                "learner.worker:LearnerWorker", config, rank,
                num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus,
            )
            for rank in range(config.learner.ranks)
        ]  # fmt: skip
        self.queue = queue_service.start(
            plan(config), config.learner.ranks, TABLE[config.objective.name].min_valid,
            limits.failure_rate, limits.failure_window, limits.wait_seconds,
        )  # fmt: skip
        master = self.learners[0].call.remote("address")
        return [worker.call.remote("start", master, self.queue) for worker in self.learners]

    def serve(self) -> None:
        """Set the rollout actors to work."""
        assert self.fleet is not None and self.rewards is not None
        self.fleet.serve(self.queue, self.rewards.client)

    @property
    def serving(self) -> bool:
        return self.fleet is not None and bool(self.fleet.running)

    def train(self, batches: int) -> list[Any]:
        """One call to every rank, for so many batches."""
        return [worker.call.remote("train", batches) for worker in self.learners]

    def evaluate(self, version: Version, weights: Any, number: int) -> Any:
        """The call that evaluates these weights (an object reference)."""
        return self.evaluator.call.remote("evaluate", version, weights, number)

    def close_queue(self) -> None:
        """Tell actors and ranks that the run is over; they come back with what they have."""
        self.queue.close.remote()

    def end_serving(self) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
        """The queue's last report, and the seconds actors spent on each part of their work."""
        if self.queue is None or self.fleet is None:
            return {}, {}
        report = self._answer(self.queue.report.remote(), EXIT_SECONDS, "the queue's report") or {}
        self._answer(self.queue.close.remote(), EXIT_SECONDS, "the queue's close")
        return report, self.fleet.finish(EXIT_SECONDS)

    def export(self, step: int) -> None:
        """Write the policy under checkpoints/, as a model directory."""
        target = self.directory.checkpoints / f"step-{step}" / "hf"
        calls = [w.call.remote("export", str(target.resolve())) for w in self.learners]
        for call in calls:
            self._answer(call, EXPORT_SECONDS, "the policy's export")

    def end(self) -> None:
        """End every process of the run."""
        if self.rewards is not None:
            self.rewards.shutdown(cluster_too=self.own_cluster)
        if self.own_cluster:
            return
        workers = [*self.learners, *(self.fleet.workers.values() if self.fleet else ())]
        for actor in [*workers, self.queue, self.evaluator]:
            if actor is not None:
                ray.kill(actor)

    def _answer(self, call: Any, seconds: float, what: str) -> Any:
        """An answer from a part that may be gone; None then, and a line that says so."""
        try:
            return ray.get(call, timeout=seconds)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self.say(f"{what} is missing: {type(error).__name__}")
            return None
