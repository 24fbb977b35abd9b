"""A rank of a supervised stage as a Ray actor."""

import socket

import numpy as np
import ray

from configs.schema import Config
from learner.engine import join
from learner.stages.plan import StageStep
from learner.stages.source import Kind
from learner.stages.supervised import Supervised


class StageWorker:
    """Runs one rank. The driver asks for a number of steps at a time and gets their records."""

    def __init__(self, config: Config, kind: Kind, rank: int) -> None:
        self.config, self.kind, self.rank = config, kind, rank

    def address(self) -> tuple[str, int]:
        """Host and a free port, for rank 0 to be met at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, master: tuple[str, int], folder: str) -> None:
        """Join the ranks, read the examples, load the network, and a checkpoint if one is given."""
        join(self.rank, self.config.learner.ranks, master, self.config.cluster.threads)
        self.trained = Supervised(self.config, self.kind, self.rank)
        if folder:
            self.trained.load(folder)

    def train(self, count: int) -> list[StageStep]:
        """`Supervised.train`."""
        return self.trained.train(count)

    def evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """`Supervised.evaluate`."""
        return self.trained.evaluate()

    def save(self, folder: str) -> None:
        """`Supervised.save`."""
        self.trained.save(folder)

    def export(self, directory: str) -> None:
        """`Supervised.export`."""
        self.trained.export(directory)
