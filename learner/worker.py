"""A learner rank as a Ray actor: fetch, consume, commit, publish."""

import socket
import time
from collections import deque
from typing import Any

import numpy as np
import ray
import torch

from actors import policy
from actors.rollout import Version
from configs import faults
from configs.schema import Config
from learner import checkpoint
from learner.cells import StepRecord
from learner.engine import join, leave
from learner.learner import Learner
from learner.publisher import publisher
from learner.replay.clients import LearnerQueue, received


class LearnerWorker:
    """Runs one rank. The driver asks for a number of batches at a time and gets their records."""

    def __init__(self, config: Config, rank: int, fault_folder: str) -> None:
        faults.install(config.cluster.faults, fault_folder)
        self.config = config
        self.rank = rank
        # What actors may still be given: the newest, those that are due later, one on its way.
        self.published: deque[tuple[Version, list[Any]]] = deque(maxlen=config.replay.lag + 2)

    def address(self) -> tuple[str, int]:
        """Host and a free port, for rank 0 to be met at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(
        self, master: tuple[str, int], queue: Any, restored: tuple[str, int, int] | None
    ) -> list[Any]:
        """Join the ranks, load the networks, publish; rank 0 returns π_ref's weights and those it
        begins with, or references to them.

        restored: a checkpoint's folder, the lineage that goes on from it, and its batch; without a
        folder, a lineage that begins anew.
        """
        join(self.rank, self.config.learner.ranks, master, self.config.cluster.threads)
        self.learner = Learner(self.config, self.rank)
        seconds = self.config.limits.wait_seconds
        self.queue = LearnerQueue(queue, self.rank, seconds, self.published)
        self.publisher = publisher(self.config, self.learner, self.rank)
        self.number = 0
        before: list[tuple[Version, Any]] = []
        if restored:
            folder, lineage, self.number = restored
            self.learner.version = Version(lineage, 0)
            if folder:
                before = checkpoint.load(self.learner, folder, lineage)
        for version, flat in before:
            self.learner.remember(version, flat)
            self._publish(version, [self._put(flat), None])
        weights = self.publisher.publish(push=False)
        self._publish(self.learner.version, [weights, self.learner.probe()])
        return [self.publisher.initial(), weights]

    def _publish(self, version: Version, weights: list[Any]) -> None:
        if self.rank == 0:
            self.queue.publish(version, weights)

    def train(self, batches: int, folder: str = "") -> list[StepRecord]:
        """Consume so many batches; fewer where the run was closed.

        folder: of the checkpoint to begin to write after the last one.
        """
        torch.set_num_threads(self.config.cluster.threads)  # counts for the thread that calls it
        records: list[StepRecord] = []
        for left in range(batches, 0, -1):
            record = self._batch(folder if left == 1 else "")
            if record is None:
                break
            records.append(record)
        return records

    def _batch(self, folder: str) -> StepRecord | None:
        started = time.perf_counter()
        faults.hit("learner.consume.before")
        batch = self.queue.get(self.learner.version.lineage, self.number)
        if batch is None:
            return None
        waited = time.perf_counter() - started
        faults.hit("learner.consume.after")
        record, derived = self.learner.consume(batch)
        faults.hit("learner.step.after")
        publishing = time.perf_counter()
        publishes = self.learner.publishes(self.number)
        evaluates = self.learner.evaluates(self.number)
        weights = self.publisher.publish(publishes) if publishes or evaluates else None
        faults.hit("learner.publish.before")
        probe = self.learner.probe() if publishes else None
        due = None
        if publishes and self.rank == 0:
            due = (self.learner.version, [weights, probe])
        self.queue.commit(batch, record.stepped, derived, due, folder)
        faults.hit("learner.publish.after")
        record.weights = [weights] if evaluates and weights is not None else None
        ended = time.perf_counter()
        self.number += 1
        stalled = self.save(folder) if folder else 0.0
        record.seconds.update(
            wait=waited, publish=ended - publishing, checkpoint=stalled,
            all=time.perf_counter() - started,
        )  # fmt: skip
        return record

    def join(self, workers: dict[int, Any]) -> None:
        """Rollout actors' processes by index, to push weights to; also while `train` runs."""
        for actor, handle in workers.items():
            self.publisher.join(actor, handle)

    def save(self, folder: str) -> float:
        """Begin to write this rank's part of a checkpoint; returns the seconds that it took."""
        started = time.perf_counter()
        self.queue.settle()
        newest = self.learner.version.step
        wait = self.config.limits.wait_seconds
        due = [(v, w[0]) for v, w in self.published if v.step < newest]
        lagged = [(v, received(weights, wait)) for v, weights in due]
        checkpoint.save(self.learner, self.learner.engine.writer, folder, lagged)
        return time.perf_counter() - started

    def leave(self) -> None:
        """Leave the ranks, so that this process can join others."""
        leave()

    def written(self) -> bool:
        """Whether this rank's part is written; OSError where the disk refused it."""
        return self.learner.engine.writer.done()

    def _put(self, flat: np.ndarray) -> Any:
        return ray.put(flat) if self.rank == 0 else None

    def export(self, directory: str) -> None:
        """Write the policy as a model directory that transformers and vLLM open (safetensors)."""
        flat = self.learner.weights()
        if self.rank == 0:
            shape = policy.architecture(self.config)
            model = policy.build(shape, self.config.learner.precision)
            policy.unflatten(model, flat)
            model.save_pretrained(directory)
