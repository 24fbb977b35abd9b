"""A trial's metrics as rows of a study's table."""

import json
from pathlib import Path

import pandas as pd
import pytest

from cluster.study.results import Kept, frame, rows
from cluster.study.trial import Outcome, Trial


def line(step: int, cells: list[tuple[int, int, int]], **more: float) -> str:
    """A step's line; cells: age, reuse and rollouts of each."""
    table = [{"age": a, "reuse": r, "rollouts": n} for a, r, n in cells]
    used = sum(n for _, _, n in cells)
    means = {
        "age": {"mean": sum(a * n for a, _, n in cells) / used},
        "reuse": {"mean": sum(r * n for _, r, n in cells) / used},
    }
    return json.dumps({"step": step, "step_seconds": 0.5, "cells": table, **means, **more}) + "\n"


def finished(folder: Path, text: str) -> Outcome:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)
    summary = {"status": "finished", "reward_initial": 0.1}
    (folder / "summary.json").write_text(json.dumps(summary))
    return Outcome(Trial({"T": "2"}, 3, 1e-3), folder, 1e-3, rows(folder))


def test_a_row_is_an_evaluation_with_the_means_since_the_one_before(tmp_path):
    text = (
        line(1, [(0, 1, 10)], ess=1.0)
        + line(2, [(1, 2, 10)], ess=0.5, reward_eval=0.3)
        + line(3, [(2, 1, 4), (3, 2, 6)], reward_eval=0.6)
    )
    table = frame([finished(tmp_path / "trial", text)])
    assert list(table.step) == [0, 2, 3] and list(table.reward_eval) == [0.1, 0.3, 0.6]
    assert table.ess.iloc[1] == 0.75 and table.ess.isna().iloc[2]
    assert list(table.age.iloc[1:]) == pytest.approx([0.5, 2.6])
    assert list(table.age_first.iloc[1:]) == [0.0, 2.0]  # at the first use only
    assert list(table.queries) == [0, 10, 14] and list(table.seconds) == [0.0, 1.0, 1.5]
    assert set(table["T"]) == {"2"} and set(table.seed) == {3}


def test_a_failed_trial_is_a_row_that_says_why(tmp_path):
    good = finished(tmp_path / "trial", line(1, [(0, 1, 10)], reward_eval=0.2))
    bad = Outcome(Trial({"T": "1"}, 0), tmp_path / "bad", 1e-3, [], "the reward broke")
    table = frame([good, bad])
    (row,) = table[table.status == "failed"].itertuples()
    assert row.failure == "the reward broke" and row.reward_eval != row.reward_eval


def test_a_finished_trial_is_known_without_its_run_directory(tmp_path):
    text = line(1, [(0, 1, 10)], reward_eval=0.2) + line(2, [(0, 1, 10)], ess=0.5, reward_eval=0.6)
    trial = finished(tmp_path / "trial", text)
    kept = Kept(tmp_path / "trials.parquet")
    kept.add("trial", trial.rows)
    kept.add("unfinished", rows(tmp_path / "nowhere"))
    again = Kept(tmp_path / "trials.parquet")
    assert again.of("unfinished") == [] == again.of("another")
    same = Outcome(trial.trial, trial.folder, 1e-3, again.of("trial"))
    pd.testing.assert_frame_equal(frame([trial]), frame([same]), check_dtype=False)
