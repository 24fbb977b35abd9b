"""A step that is not finite is skipped and counted; three in a row stop the run."""

from types import SimpleNamespace

import pytest

from actors.rollout import Version
from cluster.books import Books, NotFinite
from cluster.summary import Tally
from learner.cells import StepRecord
from tests.harness import settings

INDEX = {"tokens": 1000, "rollouts": 100, "reward_mean": 0.5}


def books(tmp_path, *overrides: str) -> Books:
    directory = SimpleNamespace(metrics=tmp_path / "m.jsonl", samples=tmp_path / "s.jsonl")
    said: list[str] = []
    progress = SimpleNamespace(message=said.append, update=lambda line: None, said=said)
    return Books(settings("bandit", *overrides), directory, progress)


def skip(books: Books, batch: int) -> None:
    books.record([StepRecord(batch, 0, Version(0, 7), False, float("nan"), {}, INDEX, 1e-3)], {})


def test_three_in_a_row_stop_the_run_and_say_which(tmp_path):
    kept = books(tmp_path)
    skip(kept, 10)
    skip(kept, 11)
    with pytest.raises(NotFinite, match=r"batches 10 … 12: .*limits.skipped_steps=3.*step 7"):
        skip(kept, 12)
    assert kept.tally.skipped == 3
    assert kept.progress.said[0] == "batch 10: not finite, its step is skipped"


def test_a_good_step_between_starts_the_count_anew():
    tally = Tally()
    for batch, stepped in enumerate([False, False, True, False]):
        record = StepRecord(batch, 0, Version(0, batch), stepped, 0.0, {}, INDEX, 1e-3)
        tally.add([record])
    assert tally.skipped_in_a_row == 1 and tally.skipped == 3


def test_the_count_is_gone_on_with_after_a_restart(tmp_path):
    first = books(tmp_path, "limits.skipped_steps=2")
    skip(first, 0)
    again = books(tmp_path, "limits.skipped_steps=2")
    again.tally.restore(first.tally.state())
    with pytest.raises(NotFinite):
        skip(again, 1)
