"""Which rollout actors are taken to hang: a fleet whose processes are stand-ins, and a clock."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster import fleet as module
from cluster.fleet import Fleet
from cluster.placement import Placement
from tests.harness import settings


class Clock:
    now = 0.0


@pytest.fixture
def fleet(monkeypatch) -> Fleet:
    """One actor at work since second 0; what ends it is noted in `ended`."""
    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(module, "_done", lambda calls, seconds: [])
    Clock.now = 0.0
    call = SimpleNamespace(remote=lambda *arguments: object())
    crew: Any = SimpleNamespace(spawn=lambda *a, **o: SimpleNamespace(call=call))
    limits = ["limits.startup_seconds=300", "limits.lease_seconds=600"]
    config = settings("bandit", *limits)
    fleet = Fleet(config, crew, Placement(config, print), 1, "", "")
    fleet._restart = lambda index, why: why  # type: ignore[method-assign]
    fleet.serve(None, None)  # type: ignore[arg-type]
    return fleet


def test_an_actor_that_waits_for_its_lease_may_do_so_for_ever(fleet):
    Clock.now = 10_000.0
    assert fleet.watch({0: 0.0}) == []


def test_an_actor_that_was_never_heard_of_is_ended_after_the_time_to_start(fleet):
    Clock.now = 299.0
    assert fleet.watch({}) == []
    Clock.now = 301.0
    assert fleet.watch({}) == ["no word of it for 300 s"]


def test_an_actor_that_is_silent_with_a_lease_is_ended_after_the_time_for_one(fleet):
    Clock.now = 2_000.0
    assert fleet.watch({0: 599.0}) == []
    assert fleet.watch({0: 601.0}) == ["no word of it for 600 s"]


def test_a_queue_that_comes_back_and_knows_nobody_yet_costs_no_actor(fleet):
    Clock.now = 1_000.0
    assert fleet.watch({0: 1.0}) == []
    Clock.now = 1_010.0
    assert fleet.watch({}) == []  # it started long ago, and was known ten seconds ago
    Clock.now = 1_301.0
    assert fleet.watch({}) == ["no word of it for 300 s"]


def test_what_an_actor_that_came_back_early_said_of_its_time_is_kept(fleet, monkeypatch):
    """The watch may see that an actor is done before the run's end asks it."""
    seconds = {"lease": 1.0, "generate": 2.0}
    monkeypatch.setattr(module, "_done", lambda calls, seconds: list(calls))
    monkeypatch.setattr(module.ray, "get", lambda call: seconds)
    assert fleet.watch({0: 0.0}) == [] and not fleet.running
    assert fleet.finish(0.0) == {0: seconds}
