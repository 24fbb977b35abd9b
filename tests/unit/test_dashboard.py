"""What the live page tells of a run is what its files hold, read once and bounded in length."""

import json
import os

import numpy as np
import pytest

from cluster.dashboard import charts, history, runs
from cluster.dashboard.history import History
from cluster.dashboard.runs import Catalogue, Run, find
from cluster.metrics import METRICS
from cluster.report import data as report_data
from cluster.report.tables import CellSum, merge
from cluster.thinning import thin
from tests.run_folders import line, write


def test_only_added_lines_are_read_and_half_a_line_waits(tmp_path, monkeypatch):
    read: list[bytes] = []
    decoded = history._decoded
    monkeypatch.setattr(history, "_decoded", lambda text: read.append(text) or decoded(text))
    path = write(tmp_path, [line(1), line(2)]) / "metrics.jsonl"
    followed = History(path)
    followed.refresh()
    text = json.dumps(line(3))
    with path.open("a") as file:
        file.write(text[:20])
        file.flush()
        followed.refresh()
        assert followed.lines == 2
        file.write(text[20:] + "\n")
    followed.refresh()
    assert followed.lines == 3 and followed.unreadable == 0
    assert len(read) == 3, "a line was read twice"
    steps, values = followed.curve("reward_mean")
    assert steps.tolist() == [1, 2, 3] and values.tolist() == [0.1, 0.2, 0.1 * 3]


def test_a_long_file_is_shown_in_parts_and_nothing_is_missing_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "AT_A_TIME", 0.0)
    run = Run("run", write(tmp_path, [line(step) for step in range(1, 501)]))
    seen = []
    while not seen or not seen[-1]["read"]:
        payload = run.payload(seen[-1]["tag"] if seen else "")
        assert payload is not None, "it would never be known to be whole"
        seen.append(payload)
    assert [payload["lines"] for payload in seen] == [200, 400, 500, 500]
    assert seen[-1]["curves"]["loss"]["y"] == [1 / step for step in range(1, 501)]


def test_a_file_that_is_not_what_it_was_is_read_anew(tmp_path):
    directory = write(tmp_path, [line(step) for step in range(1, 9)])
    followed = History(directory / "metrics.jsonl")
    followed.refresh()
    first = followed.readings
    write(tmp_path, [line(step) for step in range(1, 4)])  # cut to a checkpoint
    followed.refresh()
    assert (followed.lines, followed.readings) == (3, first + 1)
    other = [line(step) | {"loss": -1.0} for step in range(1, 20)]  # cut, and gone on beyond
    write(tmp_path, other)
    followed.refresh()
    assert (followed.lines, followed.readings) == (19, first + 2)
    assert set(followed.curve("loss")[1]) == {-1.0}
    anew = directory / "new"
    anew.write_text("".join(json.dumps(one) + "\n" for one in [*other, line(20)]))
    os.replace(anew, directory / "metrics.jsonl")  # another file of that name
    followed.refresh()
    assert (followed.lines, followed.readings) == (20, first + 3)
    (directory / "metrics.jsonl").unlink()
    followed.refresh()
    assert followed.lines == 0 and followed.names() == []


@pytest.mark.parametrize("text", [
    "{", "[]", "3", '{"loss": 1}', '{"step": "x"}', '{"step": 1, "cells": 3}', '{"step": 1%s}'
    % ("0" * 400), '{"step": 1, "age": [2]}', '{"step": 1, "age": {"histogram": {"x": 1}}}',
    "[" * 100_000, '{"step": 1, "cells": [{"age": [], "reuse": 1}]}',
])  # fmt: skip
def test_a_line_that_is_none_is_counted_and_left_out(tmp_path, text):
    directory = write(tmp_path, [line(1)])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(text + "\n" + json.dumps(line(2)) + "\n")
    payload = Run("run", directory).payload()
    assert payload is not None and payload["notes"] == ["1 unreadable lines of metrics.jsonl"]
    assert payload["curves"]["loss"]["x"] == [1, 2]


def test_what_is_not_finite_is_absent_never_zero(tmp_path):
    directory = write(tmp_path, [line(1), line(2) | {"loss": float("nan")}, line(3)])
    payload = Run("run", directory).payload()
    assert payload is not None and payload["curves"]["loss"] == {
        "x": [1, 3], "y": [1.0, 1 / 3], "of": 2
    }  # fmt: skip
    json.dumps(payload, allow_nan=False)


def test_curves_that_fit_are_the_files_numbers_bit_for_bit(tmp_path):
    draw = np.random.default_rng(0)
    lines = [line(step) | {"loss": float(draw.normal())} for step in range(1, 1001)]
    payload = json.loads(json.dumps(Run("run", write(tmp_path, lines)).payload()))
    for name in ("loss", "kl_to_generator", "reward_mean", "queue_depth"):
        assert payload["curves"][name]["y"] == [one[name] for one in lines]
        assert payload["curves"][name]["x"] == list(range(1, 1001))
    assert payload["curves"]["age.max"]["y"] == [one["age"]["max"] for one in lines]


def test_a_growing_runs_summary_is_the_reports(tmp_path):
    lines = [line(step) for step in range(1, 41)]
    directory = write(tmp_path, lines[:10])
    run = Run("run", directory)
    run.payload()
    write(tmp_path, lines)
    run.payload()
    assert run.history.tally is not None
    assert run.history.tally.summary() == report_data.read(directory).summary


def test_a_run_that_is_resumed_after_its_end_is_summed_up_from_its_lines_again(tmp_path):
    directory = write(tmp_path, [line(step) for step in range(1, 11)])
    (directory / "summary.json").write_text(json.dumps({"status": "stopped", "updates": 10}))
    run = Run("run", directory)
    first = run.payload()
    assert first is not None and first["complete"] and run.history.tally is None
    (directory / "summary.json").unlink()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(11)) + "\n")
    then = run.payload(first["tag"])
    assert then is not None and not then["complete"] and then["lines"] == 11
    assert ["updates", "11", ""] in json.loads(json.dumps(then["tiles"]))


def test_cells_added_one_by_one_are_those_merged_at_once():
    rows = [
        {"age": 1, "reuse": 2, "rollouts": n, "ess": 0.1 * n, "gradient_share": 0.5, "x": None}
        for n in (3, 1, 6)
    ]
    assert merge(rows) == {
        "age": 1, "reuse": 2, "rollouts": 10, "gradient_share": 1.5,
        "ess": pytest.approx((0.3 * 3 + 0.1 + 0.6 * 6) / 10),
    }  # fmt: skip
    empty = CellSum(rows[0])
    empty.add([{"rollouts": 0, "ess": 0.5, "gradient_share": None}])
    assert empty.row() == {"age": 1, "reuse": 2, "rollouts": 0, "gradient_share": None}


@pytest.mark.parametrize("length", [1001, 1998, 12_345, 50_000])
def test_a_thinned_curve_keeps_its_ends_and_every_spike(length):
    y = np.random.default_rng(length).normal(size=length)
    y[length // 3], y[length // 2] = 99, -99
    x, kept = thin(np.arange(length), y)
    assert 500 < len(x) <= 1000 and (np.diff(x) > 0).all() and (y[x] == kept).all()
    assert x[0] == 0 and x[-1] == length - 1 and {99, -99} <= set(kept)


def test_a_payload_of_50_000_steps_is_bounded(tmp_path):
    numbers = {metric.name: 0.123456789012345 for metric in METRICS} | line(1)
    text = json.dumps(numbers | {"step": 7777}).replace("7777", "%d") + "\n"
    directory = write(tmp_path, [])
    (directory / "metrics.jsonl").write_text("".join(text % (n + 1) for n in range(50_000)))
    run = Run("run", directory)
    run.history.refresh()
    payload = run.payload()
    assert payload is not None and payload["read"] and payload["lines"] == 50_000
    assert len(payload["curves"]) > len(METRICS)
    for curve in payload["curves"].values():
        assert len(curve["x"]) <= 1000 and curve["of"] == 50_000
        assert curve["x"][0] == 1 and curve["x"][-1] == 50_000
    assert len(json.dumps(payload)) < 1_500_000


def test_every_metric_is_in_a_chart_and_nothing_else():
    known = {metric.name for metric in METRICS}
    placed = [name.split(".")[0] for chart in charts.CHARTS for name in chart.series]
    assert set(placed) == known
    assert len(set(placed)) == len(placed) - 2  # age and reuse: mean and max


def test_a_run_is_found_by_name_and_by_path_and_what_is_none_is_refused(tmp_path):
    write(tmp_path / "runs", [line(1)], "one")
    write(tmp_path / "other", [line(1)], "one")
    found = find(["one", str(tmp_path / "other" / "one"), "one"], tmp_path / "runs")
    names = list(Catalogue(found, tmp_path).directories())
    assert names == [str(tmp_path / "runs" / "one"), str(tmp_path / "other" / "one")]
    (tmp_path / "runs" / "empty").mkdir()
    for name in ("none", "empty", ""):
        with pytest.raises(FileNotFoundError, match="no run at"):
            find([name], tmp_path / "runs")
