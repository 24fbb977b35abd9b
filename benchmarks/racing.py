"""What races of whole runs share: cores to run on, CPU time by process, settings, results.

Runs take turns in kept processes (`cluster.crew`), so that a turn is seconds long and both sides
see the same machine. Other work on it slows a clock more than it adds CPU time; races show both.
"""

import contextlib
import json
import os
import statistics
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.outside import OURS
from cluster.crew import Crew
from cluster.run_directory import describe_environment
from cluster.train import train
from configs.load import prepare

FOLDER = Path("runs/bench")
POLL_SECONDS = 0.25
FROM, TO = 0.1, 0.7  # of a run's updates: between these its CPU time is taken


def family() -> list[psutil.Process]:
    """This process and all below it, Ray's daemons and workers among them."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def pin(cores: Iterable[int]) -> None:
    """Have every thread of the family run on these cores only; what they start inherits it."""
    wanted = set(cores)
    for process in family():
        tasks = Path(f"/proc/{process.pid}/task")
        for thread in [int(task.name) for task in tasks.iterdir()] if tasks.exists() else []:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(thread, wanted)


def cpu_by_part() -> Counter[str]:
    """CPU seconds so far of each part of a run; the rest of Ray is `ray`."""
    out: Counter[str] = Counter()
    for process in family():
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        part = next((name for start, name in OURS.items() if title.startswith(start)), "ray")
        out["driver" if process.pid == os.getpid() else part] += times.user + times.system
    return out


class CpuMeter:
    """CPU seconds per update by part, over the middle of a run.

    A thread that looks twice: a look takes 10 ms of the very core that is measured.
    """

    def __init__(self, metrics: Path, updates: int) -> None:
        self.metrics, self.updates = metrics, updates
        self.seen: list[tuple[int, Counter[str]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        for share in (FROM, TO):
            while (done := self._done()) < share * self.updates:
                if self._over.wait(POLL_SECONDS):
                    return
            self.seen.append((done, cpu_by_part()))

    def _done(self) -> int:
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def per_update(self) -> dict[str, float]:
        """Empty where the run was over before there was a second look, or went on between them by
        no update."""
        if len(self.seen) < 2 or self.seen[0][0] == self.seen[1][0]:
            return {}
        (first, before), (last, after) = self.seen
        return {part: (after[part] - before[part]) / (last - first) for part in sorted(after)}


def turn(preset: str, overrides: Sequence[str], crew: Crew, folder: str, name: str) -> Any:
    """A run's summary, with `cpu_per_update` in it. RuntimeError where it did not finish."""
    config = prepare(preset, [f"run.dir={folder}", f"run.name={name}", *overrides])
    with CpuMeter(Path(folder) / name / "metrics.jsonl", config.learner.updates) as meter:
        summary = train(config, preset, crew)
    if summary["status"] != "finished":
        raise RuntimeError(f"the run ended as {summary['status']}: {summary['failure']}")
    return summary | {"cpu_per_update": meter.per_update()}


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} (from {min(values):.2f} to {max(values):.2f})"


def write(name: str, settings: dict[str, int], overrides: list[str], results: Any) -> None:
    """runs/bench/NAME.json, with the machine."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = {
        "environment": describe_environment(), "settings": settings, "overrides": overrides,
        "results": results,
    }  # fmt: skip
    (FOLDER / f"{name}.json").write_text(json.dumps(out, indent=2) + "\n")
