"""The live page in a real browser: headless Chromium, on a run that trains meanwhile."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import NASTY, TOKEN, line, write

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
UPDATES = 150
TRACES = "() => Object.fromEntries([...document.querySelectorAll('.plot')].flatMap((plot) => " \
    "(plot.data ?? []).map((one) => [one.meta.join(' '), [one.x, one.y]])))"  # fmt: skip

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="neither chromium nor google-chrome is here")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def training(root) -> Iterator["subprocess.Popen[bytes]"]:
    """A real run, under way: begun a test before it is looked at, since it takes a while to start,
    and after the one that takes the time."""
    command = [
        sys.executable, "-m", "cluster", "train", "bandit", f"run.dir={root}", "run.name=trained",
        f"learner.updates={UPDATES}", "eval.every=10",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (root.parent / "train.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def address(root) -> Iterator[str]:
    """The dashboard's own process, and the address that it prints."""
    command = [sys.executable, "-m", "cluster", "dashboard", "--runs", str(root)]
    environment = os.environ | {"ONPOLICY_DASHBOARD_TOKEN": TOKEN}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    yield process.stdout.readline().strip().replace("?token=TOKEN", "")
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address) -> Iterator[Any]:
    """A fresh page, let in by the token; at the end nothing has gone wrong in its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda request: None if request.url.startswith((address, "data:"))
              else wrong.append(f"asked {request.url}"))  # fmt: skip
    opened.goto(f"{address}?token={TOKEN}")
    yield opened
    assert wrong == []
    context.close()


def visit(page: Any, address: str, *names: str) -> float:
    """Open the page of these runs; seconds until it is drawn."""
    start = time.perf_counter()
    page.goto(address + "?" + "&".join(f"run={name}" for name in names))
    page.wait_for_selector("body[data-ready]", timeout=250_000)
    return time.perf_counter() - start


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"no {what} for {seconds:g} s"
        time.sleep(0.3)


def test_50_000_steps_open(page, address, root, record_property):
    first = json.dumps(line(1) | {"unseen": [0.123] * 80})  # 1.2 kB, as the bandit has
    first = first.replace('"step": 1, "batch": 0', '"step": %d, "batch": %d')
    (root / "long").mkdir()
    (root / "long" / "metrics.jsonl").write_text(
        "".join(first % (step, step - 1) + "\n" for step in range(1, 50_001))
    )
    size = (root / "long" / "metrics.jsonl").stat().st_size
    seconds = visit(page, address, "long")
    record_property("seconds_to_open_50_000_steps", round(seconds, 2))
    print(f"50,000 steps, {size / 1e6:.0f} MB: drawn {seconds:.2f} s after the page was asked for")
    x, _ = page.evaluate(TRACES)["long kl_to_generator"]
    assert x[0] == 1 and x[-1] == 50_000 and len(x) <= 1000
    sizes = page.evaluate("() => performance.getEntriesByType('resource').map((e) => "
                          "[new URL(e.name).pathname, e.decodedBodySize])")  # fmt: skip
    assert max(size for path, size in sizes if path == "/api/run") < 1_500_000


def test_two_runs_are_compared_and_their_text_stays_text(page, address, root, training):
    odd = f"{NASTY} <b>bold</b>"
    write(root, [line(step) for step in range(1, 31)], "plain")
    directory = write(root, [line(step) for step in range(1, 21)], odd)
    said = {"status": "finished", "failure": f"raised {NASTY}", "preset": NASTY, "objective": NASTY}
    (directory / "summary.json").write_text(json.dumps(said))
    visit(page, address)
    for name in ("plain", odd):
        page.get_by_label(name).check()
    page.wait_for_function("() => document.querySelectorAll('#heads section').length === 2")
    assert page.locator("h2", has_text="<b>bold</b>").count() == 1
    assert page.locator("#heads tr", has_text="<b>bold</b>").count() == 1
    assert page.locator("main img, main b b").count() == 0
    assert page.locator("#chart-0 .legendtext", has_text="<b>bold</b>").count() == 1
    traces = page.evaluate(TRACES)
    assert len(traces["plain loss"][0]) == 30 and len(traces[f"{odd} loss"][0]) == 20
    assert page.locator("#grids .card:visible table").count() == 1  # the finished one has no cells
    page.get_by_label(odd).uncheck()
    page.wait_for_function("() => document.querySelectorAll('#heads section').length === 1")
    assert page.url.endswith("?run=plain")


def test_charts_move_while_the_run_trains_and_show_what_the_file_says(
    page, address, root, training, tmp_path
):
    path = root / "trained" / "metrics.jsonl"
    until(lambda: path.is_file() and path.stat().st_size > 0, 240, "line of the run's metrics")
    visit(page, address, "trained")
    chart, name = page.locator("#chart-0 svg.main-svg").first, "trained kl_to_generator"

    def points() -> int:
        return len(page.evaluate(TRACES).get(name, [[]])[0])

    before, seen = points(), chart.screenshot()
    assert training.poll() is None and before < UPDATES, "the run was over too soon"
    until(lambda: points() > before, 60, "new point")
    assert chart.screenshot() != seen
    assert training.wait(240) == 0
    until(lambda: "trained: ended" in page.locator("#state").inner_text(), 30, "end")
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(lines) == UPDATES == points()
    traces = page.evaluate(TRACES)
    for metric in ("kl_to_generator", "loss", "reward_eval", "ess", "queue_depth", "reward_mean"):
        known = [(one["step"], one[metric]) for one in lines if metric in one]
        assert list(map(tuple, zip(*traces[f"trained {metric}"]))) == known and known
    for inner in ("mean", "max"):
        assert traces[f"trained age.{inner}"][1] == [one["age"][inner] for one in lines]
    retired = [one["retired_total"]["exhausted"] for one in lines]
    assert traces["trained retired_total.exhausted"][1] == retired
    summary = json.loads((root / "trained" / "summary.json").read_text())
    assert f"issued {summary['ledger']['issued']:,}" in page.locator("#heads").inner_text()
    assert page.locator("#grids tr").count() == 1 + 10  # ages 0 … 9
    filled = page.locator("#grids td").filter(has_text=re.compile("."))
    assert filled.count() == len(summary["cells"]) == 10  # lockstep: reuse is age + 1
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_the_page_says_when_the_server_is_gone(browser, root):
    command = [sys.executable, "-m", "cluster", "dashboard", "--runs", str(root)]
    environment = {k: v for k, v in os.environ.items() if k != "ONPOLICY_DASHBOARD_TOKEN"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    opened = browser.new_page()
    opened.goto(process.stdout.readline().strip())
    opened.wait_for_selector("body[data-ready]")
    process.terminate()
    process.wait(30)
    opened.wait_for_function(
        "() => document.getElementById('state').textContent.includes('no answer')"
    )
    opened.close()
