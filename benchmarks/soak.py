"""A long pipelined run, and whether its processes' memory and open files stay flat.

Settings of its own: minutes=60 warmup=10 (minutes left out at the start) every=10 (seconds between
two looks); all others are the run's. Memory is a process's own, anonymous and shared: not the pages
of libraries, whose share changes with what else runs on the machine. The slopes are least-squares
lines, in MB per hour, over what is left and over its second half, by process.
"""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.outside import OutsideRun, own_settings, part, title, write

FOLDER = Path("runs/soak")
MB = 1e6


def main(overrides: list[str]) -> None:
    """Run it, print and keep the record."""
    own, rest = own_settings(overrides, {"minutes": 60.0, "warmup": 10.0, "every": 10.0})
    settings = ["learner.updates=10000000", "eval.every=1000", "resume=never", *rest]
    run = OutsideRun("bandit_pipelined", settings, FOLDER, "soak")
    run.wait_for_step(1, 300.0)
    looks = watch(run, own["minutes"] * 60, own["every"])
    run.process.send_signal(signal.SIGTERM)
    summary = run.finish(300.0)
    rows = slopes(looks, own["warmup"] * 60)
    for row in rows:
        print(
            f"{row['process']:40} {row['first_mb']:8.1f} → {row['last_mb']:8.1f} MB  "
            f"{row['mb_per_hour']:+8.2f} MB/h, {row['mb_per_hour_late']:+.2f} late  "
            f"files {row['first_files']} → {row['last_files']}"
        )
    print(f"{summary['status']}, {summary['updates']} updates, ledger {summary['ledger']}")
    record = {
        "settings": own, "processes": rows, "updates": summary["updates"],
        "ledger": summary["ledger"], "recovery": summary["recovery"],
        "command": " ".join(["bench", "soak", *overrides]),
    }  # fmt: skip
    print(write("soak", record))


def watch(run: OutsideRun, seconds: float, every: float) -> dict[str, list[tuple[float, ...]]]:
    """(time, bytes, open files) of each process, now and then."""
    looks: dict[str, list[tuple[float, ...]]] = {}
    began = time.monotonic()
    while time.monotonic() - began < seconds and run.process.poll() is None:
        for process in [psutil.Process(run.process.pid), *run.family()]:
            name = part(process) or title(process).split("/")[-1].split(".")[0][:30] or "driver"
            try:
                now = time.monotonic() - began
                look = (now, own_memory(process.pid), process.num_fds())
            except (psutil.Error, OSError):
                continue
            looks.setdefault(f"{process.pid} {name}", []).append(look)
        time.sleep(every)
    return looks


def own_memory(pid: int) -> float:
    """Bytes of anonymous memory, and of shared memory by its share (Linux)."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith(("Pss_Anon", "Pss_Shmem"))]
    return sum(float(kilobytes) * 1024 for _, kilobytes, _ in lines)


def slopes(looks: dict[str, list[tuple[float, ...]]], warmup: float) -> list[dict[str, Any]]:
    """A line for each process that was there to the end."""
    rows = []
    for name, all_of_it in looks.items():
        table = np.array([look for look in all_of_it if look[0] >= warmup])
        if len(table) < 6:
            continue
        hours, megabytes, half = table[:, 0] / 3600, table[:, 1] / MB, len(table) // 2
        rows.append({
            "process": name,
            "first_mb": float(megabytes[0]), "last_mb": float(megabytes[-1]),
            "mb_per_hour": float(np.polyfit(hours, megabytes, 1)[0]),
            "mb_per_hour_late": float(np.polyfit(hours[half:], megabytes[half:], 1)[0]),
            "first_files": int(table[0, 2]), "last_files": int(table[-1, 2]),
        })  # fmt: skip
    return rows
