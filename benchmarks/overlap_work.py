"""Actors and learner whose stages take longer by a set time, so that overlap can be measured at any
balance of the two.

`work`: forward passes of the policy until so much CPU time of the thread is used up: it keeps a
core busy. `sleep`: sleep stands for a GPU, which works while its process waits.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.engine import Request
from actors.rollout import Rollouts
from cluster.crew import Crew
from cluster.rollout_worker import RolloutWorker
from configs.schema import Config
from learner.worker import LearnerWorker

KINDS = ("sleep", "work")
ROWS, COLUMNS = 100, 10  # of an extra forward pass


def spend(kind: str, seconds: float, model: Any) -> None:
    """Take so many seconds more, of the clock or of CPU time."""
    if kind == "sleep":
        time.sleep(seconds)
        return
    end = time.thread_time() + seconds
    tokens = torch.zeros((ROWS, COLUMNS), dtype=torch.long)
    with torch.no_grad():
        while time.thread_time() < end:
            model(tokens, use_cache=False)


class SlowedWorker(RolloutWorker):
    """An actor whose generation takes `seconds` more for each lease."""

    def __init__(
        self, config: Config, index: int, offline_path: str, fault_folder: str, kind: str,
        seconds: float,
    ) -> None:  # fmt: skip
        super().__init__(config, index, offline_path, fault_folder)
        engine: Any = self.engine
        generate = engine.generate

        def slowed(requests: Sequence[Request], stream: str) -> Rollouts:
            block: Rollouts = generate(requests, stream)
            spend(kind, seconds, engine.model)
            return block

        engine.generate = slowed


class SlowedLearner(LearnerWorker):
    """A learner whose step takes `seconds` more."""

    def __init__(
        self, config: Config, rank: int, fault_folder: str, kind: str, seconds: float
    ) -> None:
        super().__init__(config, rank, fault_folder)
        self.kind, self.more = kind, seconds

    def start(
        self, master: tuple[str, int], queue: Any, restored: tuple[str, int, int] | None
    ) -> list[Any]:
        begun = super().start(master, queue, restored)
        learner: Any = self.learner
        consume = learner.consume

        def slowed(batch: Any) -> tuple[Any, dict[str, np.ndarray]]:
            started = time.perf_counter()
            record, derived = consume(batch)
            spend(self.kind, self.more, learner.engine.policy)
            record.seconds["step"] = time.perf_counter() - started
            return record, derived

        learner.consume = slowed
        return begun


class SlowedCrew(Crew):
    """Kept processes, of actors and learner the slowed ones. Set `kind`, `lease` and `step`
    (seconds more of each) before a run."""

    kind, lease, step = "sleep", 0.0, 0.0

    def __init__(self) -> None:
        super().__init__(keep=True)

    def spawn(self, target: str, *arguments: Any, **options: Any) -> Any:
        if target.endswith(":RolloutWorker"):
            target = "benchmarks.overlap_work:SlowedWorker"
            arguments = (*arguments, self.kind, self.lease)
        elif target.endswith(":LearnerWorker"):
            target = "benchmarks.overlap_work:SlowedLearner"
            arguments = (*arguments, self.kind, self.step)
        return super().spawn(target, *arguments, **options)
