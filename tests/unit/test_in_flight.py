"""The in-flight actor: several leases at once, newer weights while requests run, never older."""

import queue
import threading
import time

import numpy as np
import pytest

from actors.actor import Lease
from actors.engine import Request
from actors.in_flight import InFlightActor
from actors.packing import pack
from actors.probe import Probe
from actors.prompts import Prompt
from actors.rollout import GroupId, Rollouts, Version
from tests.harness import LocalRewards, settings


class SlowEngine:
    """Answers with the version it has, a token every few milliseconds."""

    def __init__(self) -> None:
        self.version = Version(-1, -1)
        self.loaded: list[Version] = []
        self.running = self.most_running = 0

    def load(self, weights: np.ndarray, version: Version) -> None:
        assert weights[0] == version.step
        self.version = version
        self.loaded.append(version)

    def score(self, text_NT: np.ndarray) -> np.ndarray:
        """Only the weights that were loaded agree with what `Published` has their learner say."""
        time.sleep(0.005)
        return np.full(text_NT[:, 1:].shape, -float(self.version.step), dtype=np.float32)

    def generate(self, requests: list[Request], stream: str) -> Rollouts:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        steps = []
        for _ in range(20):
            steps.append(self.version.step)
            time.sleep(0.005)
        self.running -= 1
        k = np.array(steps)
        return pack(requests, 1, 1.0, np.array([20]), k, -np.ones(20), 0 * k, k)


class Published:
    """A queue with six leases, whose learner publishes a version every few milliseconds."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.leases: queue.Queue[int] = queue.Queue()
        self.blocks: list[tuple[Lease, Rollouts]] = []
        self.probes: list[float] = []
        for position in range(6):
            self.leases.put(position)

    def _lease(self, id_: int, groups: tuple[GroupId, ...], step: int) -> Lease:
        said = Probe(np.zeros((1, 2), dtype=np.int32), np.array([[-step]], dtype=np.float32))
        return Lease(id_, groups, Version(0, step), [np.array([step], dtype=np.float32), said])

    def _step(self) -> int:
        return int((time.monotonic() - self.began) / 0.02)

    def lease(self, actor: int) -> Lease | None:
        try:
            position = self.leases.get_nowait()
        except queue.Empty:
            return None
        return self._lease(position, (GroupId(position, 0),), max(0, self._step() - 1))

    def newer(self, than: Version) -> Lease | None:
        while len(self.blocks) < 6:
            if (step := self._step()) > than.step:
                return self._lease(-1, (), step)
            time.sleep(0.001)
        return None

    def weights(self, lease: Lease) -> np.ndarray:
        return lease.weights[0]

    def put(self, lease: Lease, block: Rollouts) -> None:
        self.blocks.append((lease, block))

    def probed(self, nats: float) -> None:
        self.probes.append(nats)


class Prompts:
    def __getitem__(self, position: int) -> Prompt:
        return Prompt(np.array([position], dtype=np.int32), position)


def actor_of(engine, published, slots: int = 2) -> InFlightActor:
    rewards = LocalRewards(settings("bandit"))
    return InFlightActor(0, engine, Prompts(), [published] * (slots + 1), rewards, 10.0)


def test_slots_share_the_engine_and_versions_only_go_up():
    engine, published = SlowEngine(), Published()
    seconds = actor_of(engine, published).run()
    assert engine.most_running == 2
    assert engine.loaded == sorted(set(engine.loaded)) and len(engine.loaded) >= 4
    assert sorted(lease.id for lease, _ in published.blocks) == list(range(6))
    for lease, block in published.blocks:
        assert block.oldest_step_N()[0] >= lease.version.step
        assert not np.isnan(block.reward_N).any()
    assert any(len(set(block.step_K)) > 1 for _, block in published.blocks)
    assert seconds["generate"] > 0.5


def test_every_load_is_probed_before_another_changes_the_weights():
    engine, published = SlowEngine(), Published()
    actor_of(engine, published).run()
    assert published.probes == [0.0] * len(engine.loaded)


def test_a_failure_in_one_thread_ends_the_actor_at_once():
    engine, published = SlowEngine(), Published()
    published.newer = lambda than: time.sleep(5.0)
    failing = threading.Event()

    def generate(requests: list[Request], stream: str) -> Rollouts:
        failing.set()
        raise RuntimeError("the engine is gone")

    engine.generate = generate
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the engine is gone"):
        actor_of(engine, published).run()
    assert failing.is_set() and time.monotonic() - started < 2.0
