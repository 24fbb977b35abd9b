"""The report page: from any run directory, whole or not, one page that needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import wording
from cluster.report import data as report_data
from cluster.report import page as report
from cluster.report import tables as report_tables
from cluster.report.plots import thin

NASTY = "<script>alert('x')</script>"
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that what opens is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def flat(self) -> str:
        return " ".join(self.text.split())


def line(batch: int, offline: bool = False, evaluate: bool = True) -> dict[str, Any]:
    age, reuse = batch % 4, batch % 4 + 1
    out: dict[str, Any] = {
        "step": batch + 1, "lineage": 0, "batch": batch, "round": batch // 4,
        "loss": 1 / (batch + 1), "reward_mean": batch / 40, "kl_to_reference": batch / 100,
        "reuse": {"mean": reuse, "max": reuse, "histogram": {str(reuse): 20}},
        "queue_depth": 20, "rollouts_in_flight": 0, "retired_total": {"exhausted": 5 * batch},
    }  # fmt: skip
    cell = {"age": None if offline else age, "reuse": reuse, "rollouts": 20, "gradient_share": 1.0}
    if not offline:
        out["age"] = {"mean": age, "max": age, "histogram": {str(age): 20}}
        measured = {"kl_to_generator": 0.01 * age, "kl_from_generator": 0.02 * age, "ess": 0.9}
        out |= measured
        cell |= measured
    if evaluate and batch % 5 == 4:
        out |= {"reward_eval": batch / 30, "reward_eval_error": 0.01, "eval_kl_to_reference": 0.3}
    return out | {"cells": [cell]}


SUMMARY = {
    "status": "finished", "name": f"try {NASTY}", "preset": "bandit", "seed": 3, "objective": "ipo",
    "updates": 40, "skipped": 2, "wall_seconds": 72.4, "reward_eval": 0.9876,
    "reward_initial": 0.0314, "reward_mean": 0.8123, "kl_to_generator": 0.01234,
    "kl_to_reference": 2.871, "ess": 0.8712,
    "age": {"mean": 1.5, "max": 3, "histogram": {"0": 200, "1": 200, "2": 200, "3": 200}},
    "reuse": {"mean": 2.5, "max": 4, "histogram": {"1": 200, "2": 200, "3": 200, "4": 200}},
    "ledger": {"issued": 4321, "in_flight": 7, "queued": 14,
               "retired": {"exhausted": 4299, "expired": 0, "lost": 1}},
    "throughput": {"rollouts_per_s": 812.3, "updates_per_s": 14.2, "tokens_per_s": 8123.0},
    "idle": {"actors": 0.61, "learner": 0.12},
    "cells": [{"age": a, "reuse": a + 1, "rollouts": 200, "gradient_share": 0.25,
               "kl_to_generator": 0.0077 * a, "ess": 0.9} for a in range(4)],
}  # fmt: skip


def run_directory(path: Path, **kind: bool) -> Path:
    """A run of 40 steps, written by hand, with markup wherever text can come in."""
    path.mkdir()
    (path / "config.yaml").write_text(
        f'run: {{name: "{NASTY}"}}\nobjective: {{name: ipo}}\nlearner: {{minibatch: 20}}\n'
        "replay: {inner_epochs: 4, samples_per_round: 20}\ndata: {source: on_policy}\n"
    )
    lines = [json.dumps(line(batch, **kind)) for batch in range(40)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    samples = [
        {"round": 0, "position": 5, "member": 0, "prompt": [1, 2], "response": [71, 69],
         "reward": 0.4567, "failure": None, "steps": [3, 4]},
        {"round": 1, "position": 6, "member": 0, "prompt_text": NASTY, "response": NASTY,
         "reward": None, "failure": f"raised {NASTY}", "steps": []},
    ]  # fmt: skip
    (path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n")
    (path / "environment.json").write_text(
        json.dumps({"commit": "abc123", "packages": {"ray": "2.60.0", "evil": NASTY}})
    )
    (path / "summary.json").write_text(json.dumps(SUMMARY))
    return path


def page_of(path: Path) -> Page:
    written = report.write(path)
    assert written == path / "report.html"
    html = written.read_text(encoding="utf-8")
    assert NASTY not in html
    return Page(html)


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(run_directory(tmp_path / "run"))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "://" not in html and "@import" not in html and "<script" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "src" not in attributes
        link = attributes.get("href", attributes.get("xlink:href", "#"))
        assert link.startswith(("#", "data:")), link


def test_gold_stands_beside_the_proxy_where_there_is_a_gold_reward(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    assert "gold" not in page_of(run).flat()
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for line_ in lines:
        if "reward_eval" in line_:
            line_ |= {"reward_gold": -line_["reward_eval"], "reward_gold_error": 0.1}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    gold = {"reward_gold": -0.987, "reward_gold_initial": -0.0314, "gold": {"identity": NASTY}}
    (run / "summary.json").write_text(json.dumps(SUMMARY | gold))
    text = page_of(run).flat()
    assert "Proxy and gold reward" in text and "reward_gold, right" in text
    assert "−0.0314 → −0.987" in text and NASTY in text
    (run / "summary.json").unlink()
    assert report_data.read(run).summary["reward_gold"] == -39 / 30


def test_ids_are_unique_and_resolve(tmp_path: Path) -> None:
    page = page_of(run_directory(tmp_path / "run"))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(ids)


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    page = page_of(run_directory(tmp_path / "run"))
    assert page.text.count(NASTY) >= 6  # title, heading, config, sample twice, its failure, package
    assert not [tag for tag, _ in page.tags if tag == "script"]


def test_numbers_of_the_summary_are_on_the_page(tmp_path: Path) -> None:
    text = page_of(run_directory(tmp_path / "run")).flat()
    for shown in (
        "finished", "0.0314 → 0.988", "training mean 0.812", "2 skipped", "1 min 12 s", "0.0123",
        "2.87", "0.871", "issued 4,321 = in_flight 7 + queued 14 + retired 4,300 ✓", "812", "14.2",
        "8,123", "61%", "12%", "abc123", "packages.ray 2.60.0", "0.0231", "25%", "reward 0.457",
        "71 69", "version 3–4", "seed 3", "inner_epochs: 4",
        "No sample was more than 3 optimizer steps old, none was used more than 4 times",
    ):  # fmt: skip
        assert shown in text, shown


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    page = page_of(run_directory(tmp_path / "run"))
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 7


def test_ledger_that_does_not_balance_is_marked(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run")
    ledger = SUMMARY["ledger"] | {"queued": 15}
    (path / "summary.json").write_text(json.dumps(SUMMARY | {"ledger": ledger}))
    assert "✗" in page_of(path).text


def test_killed_run_is_summed_up_from_its_metrics(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run")
    (path / "summary.json").unlink()
    whole = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(whole[:-30])  # the last line is cut off
    text = page_of(path).flat()
    assert "still going, or was killed" in text
    assert "1 unreadable line of metrics.jsonl left out" in text
    assert "– → 1.13" in text and "mean 1.46, max 3" in text
    assert "issued – = in_flight 0 + queued 20 + retired 190" in text and "✓" not in text
    summary = report_data.read(path).summary
    assert summary["kl_to_reference"] == 0.38 and summary["ess"] == pytest.approx(0.9)
    cells = summary["cells"]
    assert [row["rollouts"] for row in cells] == [200, 200, 200, 180]
    assert sum(row["gradient_share"] for row in cells) == pytest.approx(1)


def test_failure_is_stated(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run")
    failed = {"status": "failed", "failure": f"no rollout for 120 s: {NASTY}"}
    (path / "summary.json").write_text(json.dumps(SUMMARY | failed))
    assert f"The run failed: no rollout for 120 s: {NASTY}" in page_of(path).text


def test_summary_cut_off_counts_as_none(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run")
    (path / "summary.json").write_text('{"status": "fin')
    assert "no summary" in page_of(path).text


def test_run_without_evaluation(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run", evaluate=False)
    summary = SUMMARY | {"reward_eval": None, "reward_initial": None}
    (path / "summary.json").write_text(json.dumps(summary))
    text = page_of(path).flat()
    assert "– → –" in text and "No evaluation in this run yet." in text


def test_offline_run_has_no_age_rather_than_zero(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run", offline=True)
    absent = {"age": {"mean": None, "max": None, "histogram": {}}, "kl_to_generator": None}
    cells = [{"age": None, "reuse": 1, "rollouts": 200, "gradient_share": None}]
    (path / "summary.json").write_text(json.dumps(SUMMARY | absent | {"ess": None, "cells": cells}))
    text = page_of(path).flat()
    assert "Samples are offline (without age) and none was used more than 4 times." in text
    assert "No age: nothing consumed yet, or offline rollouts" in text
    assert "age – –" in text and "KL to generator – nats" in text


@pytest.mark.parametrize("name", report_data.FILES)
def test_any_one_file_is_enough_and_none_is_needed(tmp_path: Path, name: str) -> None:
    path = run_directory(tmp_path / "run")
    lacking = run_directory(tmp_path / "lacking")
    (lacking / name).unlink()
    page_of(lacking)
    for other in set(report_data.FILES) - {name}:
        (path / other).unlink()
    page_of(path)


def test_broken_files_are_no_obstacle(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run")
    (path / "config.yaml").write_text("a: [1, ${")
    (path / "environment.json").write_text("[]")
    (path / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"step": 1, "loss": NaN}\n{"st')
    text = page_of(path).flat()
    assert "2 unreadable lines of metrics.jsonl left out" in text and "a: [1, ${" in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run directory at"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run"):
        report.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_long_history_makes_a_small_page(tmp_path: Path) -> None:
    path = run_directory(tmp_path / "run")
    text = "".join(json.dumps(line(batch)) + "\n" for batch in range(20_000))
    (path / "metrics.jsonl").write_text(text)
    page_of(path)
    assert (path / "report.html").stat().st_size < 1_000_000


def test_thinning_keeps_the_extremes() -> None:
    y = np.zeros(100_000)
    y[54_321], y[12_345] = 7.0, -3.0
    x, kept = thin(np.arange(100_000), y)
    assert len(kept) <= 1000 and kept.max() == 7 and kept.min() == -3
    assert x[0] == 0 and x[-1] == 99_999 and (np.diff(x) > 0).all()


def test_many_cells_are_binned_without_losing_any() -> None:
    cells = [
        {"age": age, "reuse": reuse, "rollouts": 2, "gradient_share": 1 / 800, "ess": 0.5,
         "kl_to_generator": float(age)}
        for age in range(40) for reuse in range(1, 21)
    ]  # fmt: skip
    grids = {grid.measure.name: grid for grid in report_tables.grids(cells)}
    assert set(grids) == {"kl_to_generator", "ess", "gradient_share", "rollouts"}
    counts = grids["rollouts"]
    assert len(counts.rows) <= 12 and len(counts.columns) <= 12
    assert sum(int(cell.text) for _, row in counts.rows for cell in row if cell) == 1600
    first, last = grids["kl_to_generator"].rows[0], grids["kl_to_generator"].rows[-1]
    assert first[0] == "0–3" and first[1][0].text == "1.5" and last[1][0].heat == 1


def test_absent_is_a_dash_and_never_zero() -> None:
    assert wording.number(None) == wording.percent(None) == wording.duration(None) == "–"
    assert wording.number(0) == wording.number(0.0) == "0"
    assert wording.number(float("nan")) == "NaN" and wording.number(-1234.5) == "−1,234"
    assert wording.duration(59.7) == "1 min 00 s" and wording.duration(7500) == "2 h 05 min"
    assert wording.balanced({}) is None and "not known" in wording.how_on_policy({})
