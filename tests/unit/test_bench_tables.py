"""What the benches of start-up and studies make of their measurements."""

import pytest

from benchmarks import startup, studies
from cluster.__main__ import main
from cluster.startup import Startup


def test_the_machines_use_is_that_of_the_time_in_which_trials_waited(monkeypatch):
    monkeypatch.setattr(studies.os, "cpu_count", lambda: 2)
    machine = studies.Machine()
    machine.seen = [(0.0, 100.0), (4.0, 106.0), (8.0, 114.0), (12.0, 115.0)]
    assert machine.busy(last=2) == pytest.approx(14 / 16)  # the last 4 s, half idle, do not count


def test_the_table_of_studies_has_both_ratios():
    rows = [{"commands_per_min": 2.0, "one_per_min": 6.0, "several_per_min": 9.0,
             "one_busy": 0.6, "several_busy": 0.95}]  # fmt: skip
    told = studies._report(rows, 2)
    assert "commands, one by one = 4.50" in told and "a study, one at a time = 1.50" in told
    assert "machine busy 95" in told


def test_a_study_in_which_no_trial_waits_is_refused(capsys):
    assert main(["bench", "studies", "trials=2", "parallel=2"]) == 2
    assert "trials=2" in capsys.readouterr().err


def test_steps_of_a_start_come_once_and_in_their_order():
    clock = Startup()
    for step in ("inputs", "ray", "first_update"):
        clock.mark(step)
    before = clock.record()
    clock.mark("first_update")
    assert clock.record() == before
    seconds = list(before["seconds"].values())
    assert list(before["seconds"])[-1] == "first_update" and seconds == sorted(seconds)


def test_the_table_of_a_start_has_steps_processes_and_ratios():
    run = {"first_update": 20.0, "steps": {"imports": 2.0, "first_update": 20.0},
           "cpu": {"learner": 5.0, "driver": 3.0}}  # fmt: skip
    rows = [{"way": "bare", "first_update": 5.0}, {"way": "ours", **run}, {"way": "ray up", **run}]
    told = startup._report(rows)
    assert "imports 2.0 · first_update 20.0" in told and "ours = 0.25" in told
    assert told.index("learner") < told.index("driver") and "8.00" in told
