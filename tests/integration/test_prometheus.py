"""A run with Ray's dashboard, scraped by a real Prometheus through the files that ship.

One run stands for all: PPO, which has a clip fraction, with a gold reward beside the proxy. First
every panel and alert finds data in it, then its actors withhold an update.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring import dashboard
from tests.harness import free_port

ROOT = Path(__file__).parents[2]
SHIPPED = dashboard.FILE.parents[1] / "prometheus"
UNPACKED = Path(sys.prefix) / "prometheus" / "usr" / "bin"
RUN = "watched"
DATA_SECONDS = 240.0  # on a busy machine the run alone takes minutes to start

pytestmark = pytest.mark.timeout(600)


def tool(name: str) -> str:
    """prometheus or promtool; the test is skipped where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if not found:
        pytest.skip(f"no {name} here: `make .venv/prometheus` unpacks Debian's, or install it")
    return found


@dataclass
class Prometheus:
    """A server, as one asks it."""

    url: str
    began: float

    def ask(self, path: str, **query: Any) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=20) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def history(self, query: str) -> list[list[float]]:
        """The finite values of every series since the run began, one list for each."""
        now = time.time()
        found = self.ask("query_range", query=query, start=self.began, end=now, step=1)
        series = [[float(v) for _, v in s["values"]] for s in found["result"]]
        return [finite for values in series if (finite := [v for v in values if isfinite(v)])]

    def firing(self) -> set[str]:
        """Names of the alerts that fire for the run."""
        return {
            alert["labels"]["alertname"]
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing" and alert["labels"]["run"] == RUN
        }


@dataclass
class Watched:
    """The run, and the Prometheus that scrapes it."""

    prometheus: Prometheus
    run: subprocess.Popen[str]
    output: Path
    withhold: Path

    def until(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        """Wait for it while the run goes on."""
        deadline = time.monotonic() + DATA_SECONDS
        while not condition():
            assert self.run.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, what()
            time.sleep(1.0)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[Watched]:
    """A run of PPO on a Ray cluster of its own, with every interval at a second."""
    server, folder = tool("prometheus"), tmp_path_factory.mktemp("watched")
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray has sockets in it
    prometheus = Prometheus(f"http://127.0.0.1:{free_port()}", time.time())
    processes = [start_run(folder, ray_folder)]
    try:
        processes.append(start_prometheus(server, folder, ray_folder, prometheus.url))
        yield Watched(prometheus, processes[0], folder / "output", folder / "withhold")
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT if process is processes[0] else signal.SIGTERM)
        for process in processes:
            process.wait(90)
        shutil.rmtree(ray_folder, ignore_errors=True)


def start_run(folder: Path, ray_folder: Path) -> subprocess.Popen[str]:
    """As a person would start it, but for the actors that can be told to withhold weights."""
    environment = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        "RAY_TMPDIR": str(ray_folder), "WITHHOLD": str(folder / "withhold"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "tests.integration.withheld", "train", "bandit_ppo",
        f"run.dir={folder}", f"run.name={RUN}", "learner.updates=100000", "cluster.dashboard=true",
        "cluster.metrics_seconds=1", "gold.kind=peak", "gold.centre=20", "eval.every=10",
        "eval.samples=10",
    ]  # fmt: skip
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True
        )


def start_prometheus(
    server: str, folder: Path, ray_folder: Path, url: str
) -> subprocess.Popen[str]:
    """With the shipped configuration: other intervals, and Ray in another folder."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(SHIPPED / name) for name in config["rule_files"]]
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    discovery["refresh_interval"] = "1s"
    discovery["files"] = [
        file.replace("/tmp/ray/", f"{ray_folder}/ray/") for file in discovery["files"]
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "server").open("w") as output:
        return subprocess.Popen(
            [server, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
             f"--web.listen-address={url.removeprefix('http://')}"],
            stdout=output, stderr=output, text=True,
        )  # fmt: skip


def rules() -> list[dict[str, Any]]:
    return yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"][0]["rules"]


def queries() -> dict[str, str]:
    """Every query of the shipped dashboard by panel and line, and every alert's, in both halves
    without the comparison."""
    found = {}
    for panel in json.loads(dashboard.FILE.read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$run", RUN).replace("$__rate_interval", "10s")
            assert "$" not in query
            found[f"{panel['title']}: {target['legendFormat']}"] = query
    for rule in rules():
        expression, _, limit = rule["expr"].rpartition(" > ")
        found[f"alert {rule['alert']}"] = expression
        assert float(limit) >= 0
    return found


def test_every_panel_and_every_alert_finds_data_in_a_run(watched):
    waiting = queries()

    def answered() -> bool:
        for name in [n for n, query in waiting.items() if watched.prometheus.history(query)]:
            del waiting[name]
        return not waiting

    def up() -> bool:
        try:
            return bool(watched.prometheus.ask("status/buildinfo"))
        except OSError:
            return False

    watched.until(up, lambda: "Prometheus does not answer")
    watched.until(answered, lambda: f"no data for {sorted(waiting)}")


def test_counters_start_at_0_and_rise(watched):
    names = watched.prometheus.ask("label/__name__/values")
    ours = [name for name in names if name.startswith("ray_onpolicy") and name.endswith("_total")]
    assert len(ours) == 5
    for name in ours:
        series = watched.prometheus.history(f'{name}{{run="{RUN}"}}')
        assert series and all(values[0] == 0.0 for values in series), name
    consumed = watched.prometheus.history("sum(ray_onpolicy_cell_rollouts_total)")
    assert consumed[0][-1] > 0 and consumed[0] == sorted(consumed[0])


def test_values_are_those_of_the_jsonl(watched):
    (golds,), (kl,), (floor,) = (
        watched.prometheus.history(f"ray_onpolicy_{name}")
        for name in ("reward_gold", "kl_to_generator", "engine_mismatch_kl")
    )
    step = watched.prometheus.history("ray_onpolicy_step")[0][-1]

    def written() -> list[dict[str, Any]]:
        lines = (watched.output.parent / RUN / "metrics.jsonl").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def complete() -> bool:  # the file holds steps back until they are evaluated
        return any(line["step"] >= step for line in written())

    watched.until(complete, lambda: f"no line of step {step}")
    later = set(golds) - {golds[0]}  # the first is of π_ref, which the file has no line for
    assert later <= {line.get("reward_gold") for line in written()}
    assert set(floor) <= {line.get("engine_mismatch_kl") for line in written()}
    assert 0 <= min(kl) <= max(kl) <= max(line["kl_to_generator"] for line in written())


def test_labels_are_few_and_none_is_of_a_step(watched):
    series = watched.prometheus.ask("series", **{"match[]": '{__name__=~"ray_onpolicy_.*"}'})
    kinds = {label for labels in series for label in labels if label.islower()}
    ours = {"run", "actor", "age", "reuse", "reason", "statistic", "stage"}
    theirs = {"__name__", "instance", "job", "le"} | {k for k in kinds if k.startswith("otel_")}
    assert ours <= kinds <= ours | theirs
    assert len(series) < 250


def test_the_alert_fires_when_weights_are_withheld_and_not_before(watched):
    alert = "WeightsDidNotArrive"
    assert alert not in watched.prometheus.firing()
    watched.withhold.touch()
    watched.until(lambda: alert in watched.prometheus.firing(), lambda: watched.output.read_text())
    assert "WEIGHTS DID NOT ARRIVE" in watched.output.read_text()


def test_the_shipped_files_are_valid():
    subprocess.run([tool("promtool"), "check", "rules", SHIPPED / "alerts.yml"], check=True)
    subprocess.run(
        [tool("promtool"), "check", "config", "--syntax-only", SHIPPED / "prometheus.yml"],
        check=True,
    )
