"""The live page's data and its server: what is read, what is sent, and who gets it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cluster.__main__ import main
from cluster.dashboard import charts, history, runs
from cluster.dashboard.history import History
from cluster.dashboard.runs import Catalogue, Run, find
from cluster.dashboard.server import app
from cluster.metrics import METRICS
from cluster.report import data as report_data
from cluster.report.tables import CellSum, merge
from cluster.thinning import thin

TOKEN = "a-token-of-length"
NASTY = "<img src=x onerror=alert(1)>"


def line(step: int) -> dict[str, Any]:
    """A metrics line of a pipelined run, with as many numbers as a real one has."""
    ages = (step % 4, step % 4 + 4)
    cell = {"rollouts": 50, "gradient_share": 0.5, "kl_to_generator": 0.01 * step, "ess": 0.9}
    return {
        "step": step, "batch": step - 1, "loss": 1 / step, "reward_mean": 0.1 * step,
        "age": {"mean": 1.5, "max": ages[1], "histogram": {str(age): 50 for age in ages}},
        "reuse": {"mean": 1.0, "max": 1, "histogram": {"1": 100}},
        "kl_to_generator": 0.1 / step, "queue_depth": 100, "rollouts_in_flight": 0,
        "retired_total": {"exhausted": 100 * step, "lost": 0},
        "cells": [{"age": age, "reuse": 1, **cell} for age in ages],
    }  # fmt: skip


def write(path: Path, lines: list[dict[str, Any]], name: str = "run") -> Path:
    directory = path / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return directory


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


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path / "runs", [line(1), line(2)], "one")
    write(tmp_path / "runs", [line(1)], NASTY)
    write(tmp_path, [line(1)], "secret")
    write(tmp_path / "runs" / "bench", [line(1)], "in")
    return tmp_path / "runs"


def client(root: Path, address: str = "http://127.0.0.1:8000", **options: Any) -> TestClient:
    return TestClient(app(Catalogue([], root), [], **options), base_url=address)


def test_the_list_has_the_runs_of_the_folder_and_follows_it(root):
    with client(root) as page:
        answer = page.get("/api/runs").json()
        assert {run["name"] for run in answer["runs"]} == {"one", NASTY, "bench/in"}
        assert answer["chosen"] == [] and answer["charts"][0]["series"][0] == "kl_to_generator"
        write(root, [line(1)], "later")
        names = {run["name"]: run["status"] for run in page.get("/api/runs").json()["runs"]}
        assert names["later"] == "going"


def test_an_unchanged_run_is_not_sent_again(root):
    with client(root) as page:
        tag = page.get("/api/run", params={"name": "one"}).json()["tag"]
        asked = {"name": "one", "have": tag}
        assert page.get("/api/run", params=asked).status_code == 204
        write(root, [line(1), line(2), line(3)], "one")
        assert page.get("/api/run", params=asked).json()["curves"]["loss"]["x"] == [1, 2, 3]
        summary = {"status": "finished", "failure": NASTY}
        (root / "one" / "summary.json").write_text(json.dumps(summary))
        answer = page.get("/api/run", params=asked).json()
        assert answer["complete"] and answer["notes"] == [f"The run failed: {NASTY}"]


@pytest.mark.parametrize("name", [
    "../secret", "..", ".", "", "/", "one/", "one/../one", "one\0", "/etc", "bench",
    "bench/in/../in", "None", "ONE",
])  # fmt: skip
def test_only_listed_names_are_runs_so_no_path_leads_out(root, name):
    with client(root) as page:
        assert page.get("/api/run", params={"name": name}).status_code == 404


@pytest.mark.parametrize("path", [
    "/../pyproject.toml", "/%2e%2e/%2e%2e/pyproject.toml", "/page.html", "/server.py",
    "//etc/passwd", "/page.js/../server.py",
])  # fmt: skip
def test_no_file_but_the_pages_is_served(root, path):
    with client(root) as page:
        assert page.get(path).status_code == 404


def test_every_answer_forbids_scripts_and_styles_that_are_not_the_pages(root):
    with client(root, token=TOKEN) as page:
        for path in ("/", "/page.js", "/api/runs", "/none"):
            policy = page.get(path).headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
        with client(root) as opened:
            html = opened.get("/").text
    assert "<script>" not in html and "<style" not in html and "://" not in html


def test_without_the_token_nothing_is_told_and_it_is_said_once(root, caplog):
    with client(root, token=TOKEN) as page:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"},
                        {"Authorization": "Bearer é".encode()}, {"Cookie": "onpolicy-8000=x"},
                        {"Cookie": f"onpolicy-8000={TOKEN}"}):  # fmt: skip
            for path in ("/", "/api/runs", "/api/run?name=one", "/plotly.js", "/?token=wrong",
                         "/?token=%ff"):  # fmt: skip
                answer = page.get(path, headers=headers, follow_redirects=False)
                assert answer.status_code == 401 and "one" not in answer.text.split()
        assert len(caplog.records) == 1 and TOKEN not in caplog.text


def test_the_token_opens_the_page_as_a_header_or_once_in_the_address(root):
    with client(root, token=TOKEN) as page:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert page.get("/api/runs", headers=bearer).status_code == 200
        assert page.get("/api/runs").status_code == 401
        answer = page.get(f"/?run=one&token={TOKEN}", follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/?run=one"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        assert page.get("/api/runs").status_code == 200  # by the cookie


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_on_loopback_another_sites_name_for_this_machine_is_refused(root, host):
    with client(root) as page:
        assert page.get("/api/runs", headers={"Host": host}).status_code == 421
        for name in ("127.0.0.1:8000", "localhost", "localhost:9", "[::1]:8000", "[::1]"):
            assert page.get("/api/runs", headers={"Host": name}).status_code == 200
    with client(root, token=TOKEN, loopback=False) as page:
        headers = {"Host": "node-3:8000", "Authorization": f"Bearer {TOKEN}"}
        assert page.get("/api/runs", headers=headers).status_code == 200


@pytest.mark.parametrize("arguments, said", [
    (["--host", "0.0.0.0"], "beyond loopback: set a token"),
    (["--host", "::"], "beyond loopback: set a token"),
    (["--host", "node-3"], "beyond loopback: set a token"),
    (["--host", "0.0.0.0", "--token", "short"], "shorter than 16"),
    (["none"], "no run at none"),
    (["--port", "99999"], "cannot serve on 127.0.0.1:99999"),
    (["--runs", "nowhere"], "no folder of runs at nowhere"),
])  # fmt: skip
def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONPOLICY_DASHBOARD_TOKEN", raising=False)
    (tmp_path / "runs").mkdir()
    assert main(["dashboard", *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1
