"""A learner rank as a Ray actor: fetch, consume, commit, publish."""

import socket
import time
from typing import Any

import ray

from actors import policy
from configs.schema import Config
from learner.cells import StepRecord
from learner.engine import join
from learner.learner import Learner
from learner.replay.service import LearnerQueue


class LearnerWorker:
    """Runs one rank. The driver asks for a number of batches at a time and gets their records."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.rank = rank

    def address(self) -> tuple[str, int]:
        """Host and a free port, for rank 0 to be met at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, master: tuple[str, int], queue: Any) -> Any:
        """Join the ranks, load the networks; rank 0 publishes version 0 and returns its weights
        as a one-element list with the object reference."""
        join(self.rank, self.config.learner.ranks, master, self.config.cluster.threads)
        self.learner = Learner(self.config, self.rank)
        self.queue = LearnerQueue(queue, self.rank, self.config.limits.wait_seconds)
        weights = self._put_weights()
        if weights is not None:
            self.queue.publish(self.learner.version, weights)
        self.number = 0
        return [weights]

    def train(self, batches: int) -> list[StepRecord]:
        """Consume so many batches; fewer where the run was closed."""
        records = []
        for _ in range(batches):
            record = self._batch()
            if record is None:
                break
            records.append(record)
        return records

    def _batch(self) -> StepRecord | None:
        started = time.perf_counter()
        batch = self.queue.get(self.learner.version.lineage, self.number)
        if batch is None:
            return None
        waited = time.perf_counter() - started
        record, derived = self.learner.consume(batch)
        publishing = time.perf_counter()
        publishes = self.learner.publishes(self.number)
        evaluates = self.learner.evaluates(self.number)
        weights = self._put_weights() if publishes or evaluates else None
        self.queue.commit(batch, record.stepped, derived, weights if publishes else None)
        record.weights = [weights] if evaluates and weights is not None else None
        ended = time.perf_counter()
        record.seconds.update(wait=waited, publish=ended - publishing, all=ended - started)
        self.number += 1
        return record

    def _put_weights(self) -> Any:
        """The current weights in the object store, from rank 0; None from others."""
        flat = self.learner.weights()
        return ray.put(flat) if self.rank == 0 else None

    def export(self, directory: str) -> None:
        """Write the policy as a model directory that transformers and vLLM open (safetensors)."""
        flat = self.learner.weights()
        if self.rank == 0:
            shape = policy.architecture(self.config)
            model = policy.build(shape, self.config.learner.precision)
            policy.unflatten(model, flat)
            model.save_pretrained(directory)
