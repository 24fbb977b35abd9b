"""From the command to the bandit's first update, beside a bare process that gets there.

Three ways in turn: `bare` (`startup_bare`: one process, no Ray), `ours` (`python -m cluster train
bandit`, which starts Ray), `ray up` (the same, on a Ray cluster that runs already). Then `ours`
with the packages' files dropped from the page cache (`cold=`), and with π_ref still to be fitted.
All processes are new ones each time; page cache and fit are warm unless it says otherwise.

Settings of the bench: repeats=3, cold=1 (turns with a cold page cache); any other is the run's.
"""

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks import results
from benchmarks.outside import OutsideRun, own_settings, part, title
from cluster import connection
from configs.load import prepare

LIMIT_SECONDS = 300.0
SHORT = ["learner.updates=4", "eval.every=4"]  # the first line is written with the first update
RAYS = {
    "gcs_server": "Ray: gcs", "raylet/raylet": "Ray: raylet", "monitor.py": "Ray: monitors",
    "dashboard.py": "Ray: dashboard", "DashboardAgent": "Ray: agents",
    "RuntimeEnvAgent": "Ray: agents", "ServeController": "Serve controller", "-m cluster": "driver",
}  # fmt: skip


def main(overrides: list[str]) -> None:
    """Print the steps of a start, CPU by process, the ratio; write runs/bench/startup.json."""
    own, rest = own_settings(overrides, {"repeats": 3, "cold": 1})
    settings = [*SHORT, *rest]
    prepare("bandit", settings)  # a wrong setting is said before anything starts
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _bare()  # warms the page cache, fits π_ref where it is not cached
        for _ in range(own["repeats"]):
            rows.append({"way": "bare", "first_update": _bare()})
            rows.append(_ours("ours", settings, root))
            with _cluster(settings) as address:
                rows.append(_ours("ray up", [*settings, f"cluster.address={address}"], root))
        rows.append(_ours("π_ref unfitted", [*settings, f"policy.cache_dir={root / 'fit'}"], root))
        for _ in range(own["cold"]):
            gone = _cool()
            rows.append(_ours("cold", settings, root) | {"dropped_mb": gone})
    print(_report(rows))
    results.write("startup", rows)


def _bare() -> float:
    """Seconds of the bare process, from command to first update."""
    command = [sys.executable, "-m", "benchmarks.startup_bare"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


class _cluster:
    """A Ray cluster of this process, as an address to join."""

    def __init__(self, settings: list[str]) -> None:
        self.connection = connection.connected(prepare("bandit", settings).cluster)

    def __enter__(self) -> str:
        self.connection.__enter__()
        return str(ray.get_runtime_context().gcs_address)

    def __exit__(self, *error: object) -> None:
        self.connection.__exit__(None, None, None)


def _ours(way: str, settings: list[str], root: Path) -> dict[str, Any]:
    """A run: seconds from the command to each step, and CPU seconds by process until then."""
    launched = time.time()
    run = OutsideRun("bandit", settings, root, "run")
    spent: dict[int, tuple[str, float]] = {}
    metrics = run.directory / "metrics.jsonl"
    while run.process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        for process in [psutil.Process(run.process.pid), *run.family()]:
            try:
                times = process.cpu_times()
                spent[process.pid] = _name(process), times.user + times.system
            except psutil.Error:
                continue
        time.sleep(0.2)
    summary = run.finish(LIMIT_SECONDS)
    if summary["status"] != "finished":
        raise RuntimeError(f"the run ended as {summary['status']}: {summary['failure']}")
    startup = summary["startup"]
    before = startup["began"] - launched  # the interpreter, and the driver's imports
    cpu: dict[str, float] = {}
    for name, seconds in spent.values():
        cpu[name] = cpu.get(name, 0.0) + seconds
    steps = {"imports": before} | {k: before + s for k, s in startup["seconds"].items()}
    return {"way": way, "first_update": steps["first_update"], "steps": steps, "cpu": cpu}


def _name(process: psutil.Process) -> str:
    named = title(process)
    ours = part(process)
    return ours or next((name for word, name in RAYS.items() if word in named), "other")


def _cool() -> float:
    """Drop this repository's and all packages' files from the page cache; MB that went.

    Files that a process has mapped stay, so nothing else that uses them should run.
    """
    before = psutil.virtual_memory().cached
    for folder in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], Path.cwd()):
        for path in Path(folder).rglob("*"):
            if path.is_file() and not path.is_symlink():
                try:
                    file = os.open(path, os.O_RDONLY)
                except OSError:
                    continue
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
    return (before - psutil.virtual_memory().cached) / 1e6


def _report(rows: list[dict[str, Any]]) -> str:
    """Steps by way, CPU by process, the ratios."""
    ways = {
        way: [r for r in rows if r["way"] == way] for way in dict.fromkeys(r["way"] for r in rows)
    }
    lines = ["from the command until … (s, median):"]
    for way, of in ways.items():
        lines.append(f"  {way:15} first update {results.spread([r['first_update'] for r in of])}")
        if "steps" in of[0]:
            steps = {s: statistics.median(r["steps"][s] for r in of) for s in of[0]["steps"]}
            lines.append("    " + " · ".join(f"{name} {s:.1f}" for name, s in steps.items()))
    lines.append("CPU seconds until the first update, `ours` (median):")
    names = dict.fromkeys(name for row in ways["ours"] for name in row["cpu"])
    cpu = {n: statistics.median(r["cpu"].get(n, 0.0) for r in ways["ours"]) for n in names}
    for name, seconds in sorted(cpu.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:20} {seconds:6.2f}")
    lines.append(f"  {'all':20} {sum(cpu.values()):6.2f}")
    bare = [r["first_update"] for r in ways["bare"]]
    for way in ("ours", "ray up"):
        ratios = results.ratios(bare, [r["first_update"] for r in ways[way]])
        lines.append(f"startup: bare process / {way} = {results.spread(ratios)}")
    return "\n".join(lines)
