"""What hangs is named and ended, what stands still is written down, and restarts have a limit."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.parts import QueueSilent
from cluster.restarts import LONGEST_PAUSE, Restarts, RestartsUsedUp, reason
from cluster.watchdog import DUMP, LearnerLost, Stalled, Watchdog, is_fatal
from learner.replay.line import TooManyFailures
from learner.replay.stalls import Stalls
from tests.harness import settings

WELL = {
    "silent": 0.0, "in_hand": 0.0, "actors": {}, "journal_bytes": 0, "journal_broken": "",
    "missing": "3 of 10 groups",
}  # fmt: skip


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Any:
    """A watchdog over parts whose queue says `status`."""
    said: list[str] = []
    config = settings("bandit", "limits.step_seconds=10", "limits.stall_seconds=20")
    fleet = SimpleNamespace(
        watch=lambda unheard: [f"looked at {unheard}"] if unheard else [],
        running={}, due={}, restarts=SimpleNamespace(number=0),
    )  # fmt: skip
    parts: Any = SimpleNamespace(fleet=fleet, status=lambda: dict(WELL))
    parts.queue = SimpleNamespace(report=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr("ray.get", lambda call, timeout: {"ledger": {"issued": 7}})
    saver: Any = SimpleNamespace(look_at_journal=lambda status: None)
    directory: Any = SimpleNamespace(path=tmp_path)
    dog = Watchdog(config, parts, saver, directory, said.append)
    dog._since -= 100.0
    return SimpleNamespace(dog=dog, parts=parts, said=said, path=tmp_path)


def test_a_run_that_goes_on_is_left_alone(watched):
    watched.dog.look()
    assert watched.said == []


def test_the_fleet_is_told_who_was_not_heard_of(watched):
    watched.parts.status = lambda: WELL | {"actors": {1: 9.0}}
    watched.dog.look()
    assert watched.said == ["looked at {1: 9.0}"]


def test_a_learner_without_a_word_for_step_seconds_is_lost(watched):
    watched.parts.status = lambda: WELL | {"in_hand": 11.0}
    with pytest.raises(LearnerLost, match="10 s"):
        watched.dog.look()
    watched.dog.begin()  # asked anew just now
    watched.dog.look()


def test_a_run_that_stands_still_stops_with_its_state_written_down(watched):
    watched.parts.status = lambda: WELL | {"silent": 21.0}
    with pytest.raises(Stalled, match="3 of 10 groups"):
        watched.dog.look()
    state = json.loads((watched.path / DUMP).read_text())
    assert state["report"]["ledger"] == {"issued": 7} and state["queue"]["silent"] == 21.0


def test_a_queue_that_does_not_answer_is_said_and_not_fatal(watched):
    def silent() -> dict[str, Any]:
        raise QueueSilent("the queue did not answer for 60 s: ended")

    watched.parts.status = silent
    watched.dog.look()
    assert watched.said == ["the queue did not answer for 60 s: ended"]


def test_pauses_double_up_to_a_limit_and_so_does_patience_end():
    restarts = Restarts("the learner", "limits.learner_restarts", 8, 1.0)
    assert [restarts.count("x") for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, LONGEST_PAUSE]
    with pytest.raises(RestartsUsedUp, match=r"limits.learner_restarts=8 .* used up: disk"):
        restarts.count("disk")


def test_a_part_that_worked_for_a_while_is_restarted_without_the_long_pause(monkeypatch):
    now = 0.0
    monkeypatch.setattr("cluster.restarts.time.monotonic", lambda: now)
    restarts = Restarts("the queue", "limits.queue_restarts", 8, 1.0)
    assert [restarts.count("x") for _ in range(3)] == [1, 2, 4]
    now = 4.0 + 40.0  # it began after the pause of 4 s and lasted for ten times that
    assert [restarts.count("x") for _ in range(2)] == [1, 2]


def test_too_many_failures_are_fatal_also_from_another_process():
    error = TooManyFailures("30 of 40 failed")
    carried = SimpleNamespace(cause=error)
    assert is_fatal(error) and not is_fatal(ValueError("x"))
    assert reason(error) == "TooManyFailures: 30 of 40 failed"
    assert isinstance(carried.cause, TooManyFailures)


def test_an_actor_that_was_restarted_is_not_taken_for_its_former_self(monkeypatch):
    now = 0.0
    monkeypatch.setattr("learner.replay.stalls.time.monotonic", lambda: now)
    stalls = Stalls()
    before = stalls.called(0, 0)
    stalls.forget(0)
    stalls.answered(0, 0, before)  # too late
    assert stalls.quiet() == {}
    now = 5.0
    stalls.called(0, 0)
    now = 900.0
    assert stalls.quiet() == {0: 0.0}  # it may wait for its lease as long as it takes


def test_the_clocks_tell_who_waits_from_who_hangs(monkeypatch):
    now = 100.0
    monkeypatch.setattr("learner.replay.stalls.time.monotonic", lambda: now)
    stalls = Stalls()
    asked = stalls.called(0, 0)
    now = 130.0
    assert stalls.quiet() == {0: 0.0}  # it waits for a lease
    stalls.answered(0, 0, asked)
    with stalls.asking(5):
        now = 150.0
        assert stalls.in_hand(5) == 0.0  # the learner waits for batch 5
    now = 157.0
    assert stalls.in_hand(5) == 7.0 and stalls.quiet() == {0: 27.0}
    stalls.forget(0)
    assert stalls.quiet() == {} and stalls.idle_fraction() == pytest.approx(30 / 57)
