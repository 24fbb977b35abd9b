"""The parts of a run as processes: started together, asked, brought back, and ended."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from cluster import scale
from cluster.crew import Crew
from cluster.evaluations import Evaluations
from cluster.fleet import CALLS_AT_ONCE, Fleet, pushes
from cluster.placement import Placement
from cluster.run_directory import RunDirectory
from configs.choices import DataSource, EngineKind
from configs.schema import Config
from learner.replay import service as queue_service

if TYPE_CHECKING:
    from reward_server.service import RewardService

EXIT_SECONDS = 10.0
EXPORT_SECONDS = 120.0

# A checkpoint's folder (or none), the lineage from it on, its batch.
Restored = tuple[str, int, int]


class QueueSilent(RuntimeError):
    """The queue's process does not answer."""


class Parts:
    """Learner ranks, replay queue, rollout actors, evaluator and reward service of one run.

    say: takes a line for people. crew: has the processes. own_cluster: the Ray cluster ends with
    the run. mark: takes the names of what is there, as `Startup.record` has them.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, say: Callable[[str], None],
        crew: Crew, own_cluster: bool, mark: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.directory, self.say, self.crew = config, directory, say, crew
        self.own_cluster, self.mark = own_cluster, mark
        self.placement = Placement(config, say)
        self.faults = str(directory.faults.resolve())
        self.learners: list[Any] = []
        self.queue: Any = None
        self._evaluations: Evaluations | None = None
        self.fleet: Fleet | None = None
        self.rewards: RewardService | None = None

    def start(self, checkpoint: Path | None) -> int:
        """Bring everything up, from a checkpoint if one is given; returns the batch to go on with.

        Nothing is generated until `serve`.
        """
        config = self.config
        offline = config.data.source is DataSource.offline
        offline_path = (config.data.path or str(self.directory.offline_data)) if offline else ""
        actors = scale.actors(self.directory.path, config)
        self.placement.reserve(actors)
        self.say("starting learner, rollout actors, evaluator and reward service")
        journal = self.directory.journal if config.checkpoints else None
        self.queue = queue_service.start(config, journal, self.directory.faults)
        restored = self.roll_back(checkpoint, actors_died=True) if checkpoint else None
        ranks = self.start_learners(restored)
        self.fleet = Fleet(config, self.crew, self.placement, actors, offline_path, self.faults)
        self._evaluations = Evaluations(config, self.crew, self.placement)
        self.mark("asked")
        self.rewards = self.crew.rewards(config, self.directory.name)
        self.mark("rewards")
        self.fleet.meet(self.rewards.client)
        if self.rewards.notice:
            self.say(self.rewards.notice)
        reference, self.current = self.begun(ranks)
        self.mark("learner")
        self.evaluations.start(self.rewards.client, reference)
        if offline and not config.data.path and not self.directory.offline_data.exists():
            self.say(f"sampling {config.data.prompts} groups from π_ref")
            self.evaluations.sample_dataset(reference, offline_path)
        if config.rollout.engine is EngineKind.vllm and not offline:
            self.say("waiting for vLLM, which takes about 30 s to start")
        self.fleet.wait_ready(self.say)
        self.mark("actors")
        if pushes(config):
            self._join(self.fleet.workers)
            self.fleet.on_restart = self._join
        return restored[2] if restored else 0

    def _join(self, workers: dict[int, Any]) -> None:
        """Have rank 0 push weights to these actors from the next version on; not waited for."""
        self.learners[0].call.remote("join", workers)

    def roll_back(self, checkpoint: Path | None, actors_died: bool) -> Restored:
        """Take the queue back to a checkpoint; without one, to the beginning."""
        folder = str(checkpoint.resolve()) if checkpoint else ""
        call = self.queue.roll_back.remote(folder, actors_died)
        lineage, batch = ray.get(call, timeout=self.config.limits.startup_seconds)
        return folder, lineage, batch

    def start_learners(self, restored: Restored | None) -> list[Any]:
        """Start every rank, ending those there are; returns the calls that bring them up."""
        for worker in self.learners:
            ray.kill(worker)
        self.placement.wait(["learner"])  # whose node may be lost
        config, resources = self.config, self.config.cluster
        self.learners = [
            self.crew.spawn(
                "learner.worker:LearnerWorker", config, rank, self.faults,
                num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus,
                max_concurrency=CALLS_AT_ONCE if pushes(config) else 1,
                **self.placement.options("learner", rank),
            )
            for rank in range(config.learner.ranks)
        ]  # fmt: skip
        master = self.learners[0].call.remote("address")
        return [
            worker.call.remote("start", master, self.queue, restored) for worker in self.learners
        ]

    def begun(self, ranks: list[Any]) -> tuple[Any, Any]:
        """π_ref's weights and those that the learner begins with, or references to them."""
        answers = ray.get(ranks, timeout=self.config.limits.startup_seconds)
        if self.fleet is not None and self.fleet.running and pushes(self.config):
            self._join(self.fleet.workers)  # the ranks are new, the actors are not
        return answers[0][0], answers[0][1]

    def serve(self) -> None:
        """Set the rollout actors to work."""
        assert self.fleet is not None and self.rewards is not None
        self.fleet.serve(self.queue, self.rewards.client)

    @property
    def evaluations(self) -> Evaluations:
        """The evaluator; there from `start` on."""
        assert self._evaluations is not None
        return self._evaluations

    @property
    def actor_restarts(self) -> int:
        return self.fleet.restarts.number if self.fleet else 0

    @property
    def evaluator_restarts(self) -> int:
        return self._evaluations.restarts.number if self._evaluations else 0

    @property
    def serving(self) -> bool:
        return self.fleet is not None and bool(self.fleet.running or self.fleet.due)

    def train(self, batches: int, folder: str) -> list[Any]:
        """One call to every rank, for so many batches, with a checkpoint after the last."""
        return [worker.call.remote("train", batches, folder) for worker in self.learners]

    def save(self, batch: int, folder: str) -> None:
        """Begin a checkpoint now, between batches; returns when every part has its cut."""
        calls = [worker.call.remote("save", folder) for worker in self.learners]
        limit = self.config.limits.wait_seconds
        ray.get([*calls, self.queue.cut.remote(batch, folder)], timeout=limit)

    def queue_written(self, batch: int, folder: str) -> Any:
        """The call that comes back once the queue's part of a checkpoint is written."""
        return self.queue.written.remote(batch, folder)

    def ranks_written(self) -> list[Any]:
        """Calls that say whether each rank's part is."""
        return [worker.call.remote("written") for worker in self.learners]

    def covered(self, batch: int) -> None:
        """Nothing will be undone past this batch."""
        self.queue.covered.remote(batch)

    def status(self) -> dict[str, Any]:
        """The queue's `status`. A queue that does not answer is ended, for Ray to restart."""
        seconds = self.config.limits.queue_seconds
        try:
            status: dict[str, Any] = ray.get(self.queue.status.remote(), timeout=seconds)
        except ray.exceptions.GetTimeoutError as error:
            ray.kill(self.queue, no_restart=False)
            raise QueueSilent(f"the queue did not answer for {seconds:g} s: ended") from error
        return status

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
        if self.rewards is not None and not self.crew.keep:
            self.rewards.shutdown(cluster_too=self.own_cluster)
        if self.own_cluster:
            return
        workers = [*self.learners, *(self.fleet.workers.values() if self.fleet else ())]
        evaluator = self._evaluations.evaluator if self._evaluations else None
        self.crew.dismiss([*workers, *([evaluator] if evaluator else [])])
        self.placement.end()
        if self.queue is not None:
            ray.kill(self.queue)

    def _answer(self, call: Any, seconds: float, what: str) -> Any:
        """An answer from a part that may be gone; None then, and a line that says so."""
        try:
            return ray.get(call, timeout=seconds)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self.say(f"{what} is missing: {type(error).__name__}")
            return None
