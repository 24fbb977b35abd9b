"""The evaluator's supervision, on real Ray processes that stand for it and for the learner."""

import time
from typing import Any

import numpy as np
import pytest
import ray

from actors.rollout import Version
from cluster.evaluations import Evaluations
from cluster.placement import Placement
from tests.harness import settings


@ray.remote(num_cpus=0)
class Learner:
    """Owns weights, which go with it."""

    def put(self, *values: float) -> list[Any]:
        return [ray.put(np.full(4, value)) for value in values]


@ray.remote(num_cpus=0)
class SlowEvaluator:
    """Takes a second to come up, as imports do, then adds π_ref's weight and a version's.

    seconds: that each evaluation takes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        time.sleep(1.0)

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def start(self, rewards: Any, reference: np.ndarray) -> None:
        self.reference = reference

    def evaluate(self, version: Version, weights: np.ndarray, number: int) -> dict[str, float]:
        time.sleep(self.seconds)
        return {"reward_eval": float(self.reference[0] + weights[0])}


class OneKind:
    """A crew of such evaluators."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = 0, seconds

    def spawn(self, target: str, *arguments: Any, **options: Any) -> Any:
        self.started += 1
        return SlowEvaluator.remote(self.seconds)


def begun(*changes: str, seconds: float = 0.0) -> tuple[Evaluations, OneKind, Any, Any]:
    """Evaluations whose evaluator is starting, its crew, the learner, and a version's weights."""
    learner = Learner.remote()
    reference, weights = ray.get(learner.put.remote(1.0, 2.0))
    config = settings("bandit", "limits.backoff_seconds=0.05", *changes)
    crew: Any = OneKind(seconds)
    evaluations = Evaluations(config, crew, Placement(config, print))
    evaluations.start(None, reference)
    return evaluations, crew, learner, weights


def test_evaluations_come_in_the_order_of_their_steps(ray_cluster):
    evaluations, crew, learner, weights = begun()
    evaluations.ask(Version(0, 0), weights)
    evaluations.ask(Version(0, 5), weights)
    assert evaluations.awaited(0) and not evaluations.awaited(-1)
    assert evaluations.wait(30) == [(0, {"reward_eval": 3.0}), (5, {"reward_eval": 3.0})]
    assert crew.started == 1
    del learner  # it lives until here, and its weights with it


def test_an_evaluation_whose_weights_went_with_the_learner_is_asked_anew_and_no_restart(
    ray_cluster,
):
    evaluations, crew, learner, weights = begun()
    evaluations.ask(Version(0, 0), weights)
    ray.kill(learner)  # before the evaluator has either
    with pytest.raises(RuntimeError, match="step 0 cannot be evaluated: OwnerDied"):
        evaluations.wait(30)
    again = Learner.remote()
    reference, weights = ray.get(again.put.remote(10.0, 2.0))
    evaluations.go_back(-1, reference)
    evaluations.ask(Version(1, 0), weights)
    assert evaluations.wait(30) == [(0, {"reward_eval": 12.0})]
    assert evaluations.restarts.number == 0 and crew.started == 2


def test_an_evaluator_that_dies_is_started_again_and_asked_the_same(ray_cluster):
    evaluations, crew, learner, weights = begun()
    evaluations.ask(Version(0, 3), weights)
    ray.kill(evaluations.evaluator)
    assert evaluations.wait(30) == [(3, {"reward_eval": 3.0})]
    assert evaluations.restarts.number == 1 and crew.started == 2
    del learner  # it lives until here, and its weights with it


def test_evaluations_that_queue_up_are_late_one_by_one_and_not_together(ray_cluster):
    evaluations, crew, learner, weights = begun("limits.step_seconds=3", seconds=1.5)
    for step in range(3):
        evaluations.ask(Version(0, step), weights)
    assert [step for step, _ in evaluations.wait(4)] == [0, 1, 2]
    assert crew.started == 1 and evaluations.restarts.number == 0
    del learner  # it lives until here, and its weights with it
