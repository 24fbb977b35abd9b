"""The processes of a run, or of runs one after another in the same ones."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from cluster.placement import scorer_options
from cluster.remote import spawn
from configs.schema import Config
from reward_server.rewards import describe

if TYPE_CHECKING:
    from reward_server.service import RewardService

REST_SECONDS = 10.0  # for a process to let go of what it held


class Crew:
    """Starts processes and the reward service, and ends them, or keeps them for the next run.

    keep: what is dismissed waits for the next that asks for its kind. A process's imports of torch,
    transformers and DeepSpeed are worth some hundred updates of the bandit.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._kinds: dict[Any, tuple[Any, ...]] = {}  # of those at work
        self._resting: dict[tuple[Any, ...], list[Any]] = {}
        self._services: dict[str, RewardService] = {}

    def settings(self, config: Config, run: str) -> Config:
        """A run's settings with the name that it has. Where processes are kept, no metrics are
        exported: a gauge would stay after its run, and a study has hundreds."""
        seconds = 0.0 if self.keep else config.cluster.metrics_seconds
        return replace(
            config,
            run=replace(config.run, name=run),
            cluster=replace(config.cluster, metrics_seconds=seconds),
        )

    def spawn(self, target: str, *arguments: Any, **options: Any) -> Any:
        """`cluster.remote.spawn`, in a process that rests if there is one of the kind."""
        kind = (target, *sorted(options.items()))
        resting = self._resting.get(kind)
        if resting:
            worker = resting.pop()
            worker.build.remote(*arguments)
        else:
            worker = spawn(target, *arguments, **options)
        if self.keep:
            self._kinds[worker] = kind
        return worker

    def dismiss(self, workers: list[Any]) -> None:
        """These are done with. One that does not let go of what it held is ended."""
        calls = {worker.rest.remote(): worker for worker in workers if worker in self._kinds}
        done: list[Any] = []
        if calls:
            done = ray.wait(list(calls), num_returns=len(calls), timeout=REST_SECONDS)[0]
        rested = {calls[call] for call in done if _went_well(call)}
        for worker in workers:
            kind = self._kinds.pop(worker, None)
            if kind and worker in rested:
                self._resting.setdefault(kind, []).append(worker)
            else:
                ray.kill(worker)

    def rewards(self, config: Config, run: str) -> "RewardService":
        """The reward service of a run; where it is kept, one for each reward and its settings."""
        from reward_server.service import deploy  # Ray Serve, while the other processes start

        limits, kind = config.limits, f"{config.reward} {describe(config.reward)}"
        if kind not in self._services:
            service = deploy(
                config.reward, f"reward-{run}", limits.startup_seconds, limits.wait_seconds,
                config.cluster.threads, scorer_options(config),
            )  # fmt: skip
            if not self.keep:
                return service
            self._services[kind] = service
        return self._services[kind]

    def end(self) -> None:
        """End what is kept."""
        for worker in [worker for resting in self._resting.values() for worker in resting]:
            ray.kill(worker)
        for service in self._services.values():
            service.shutdown()
        self._resting.clear()
        self._services.clear()


def _went_well(call: Any) -> bool:
    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return False
    return True
