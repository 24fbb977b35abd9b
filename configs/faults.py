"""Faults on purpose, at named points: what the tests of reliability break, and when.

`cluster.faults` holds them, apart by commas, each `point@n:kind`: the n-th time that a process
comes to the point, it raises (`exception`), dies (`kill`), stops for good (`hang`) or waits
(`slow`). Each happens once in a run, whichever process comes first: a file in the run's `faults/`
says that it has. Without the setting a point costs one look at an empty table.
"""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

KINDS = ("exception", "kill", "hang", "slow")
SLOW_SECONDS = 1.0
_BOTH = ("before", "after")
POINTS = tuple(
    f"{where}.{when}"
    for where in (
        "actor.lease", "actor.generate", "actor.score", "actor.put",
        "queue.put", "queue.commit", "queue.write",
        "learner.consume", "learner.step", "learner.publish", "learner.write",
        "driver.rename",
    )
    for when in _BOTH
)  # fmt: skip


class InjectedFault(RuntimeError):
    """The exception that a fault of kind `exception` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault: at the n-th coming to a point, in any one process."""

    point: str
    nth: int
    kind: str

    def __str__(self) -> str:
        return f"{self.point}@{self.nth}:{self.kind}"


def parse(text: str) -> list[Fault]:
    """The faults of `cluster.faults`. ValueError says which is wrong."""
    faults = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        point, _, rest = part.partition("@")
        nth, _, kind = rest.partition(":")
        if point not in POINTS or kind not in KINDS or not nth.isdigit() or int(nth) < 1:
            raise ValueError(f"{part!r} is not point@n:kind with a known point and kind")
        faults.append(Fault(point, int(nth), kind))
    return faults


_faults: dict[str, list[Fault]] = {}
_folder = Path()
_seen: Counter[str] = Counter()


def install(text: str, folder: str) -> None:
    """Make this process subject to faults; `folder` says which have happened."""
    global _folder
    _faults.clear()
    _seen.clear()
    _folder = Path(folder)
    for fault in parse(text):
        _faults.setdefault(fault.point, []).append(fault)


def hit(point: str) -> None:
    """The process comes to a point."""
    if point not in _faults:
        return
    _seen[point] += 1
    for fault in _faults[point]:
        if _seen[point] >= fault.nth and _is_first(fault):
            _strike(fault)


def _is_first(fault: Fault) -> bool:
    try:
        _folder.mkdir(parents=True, exist_ok=True)
        (_folder / str(fault)).open("x").close()
    except FileExistsError:
        return False
    return True


def _strike(fault: Fault) -> None:
    match fault.kind:
        case "exception":
            raise InjectedFault(f"injected at {fault.point}")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            while True:
                time.sleep(3600.0)
        case "slow":
            time.sleep(SLOW_SECONDS)
