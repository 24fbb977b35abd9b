"""A run as a process of its own, watched from outside: for the records of reliability."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from benchmarks import results
from configs.errors import ConfigError

N = TypeVar("N", int, float)

OURS = {  # Ray's title of each process that may die → what it is
    "ray::RolloutWorker": "rollout actor", "ray::LearnerWorker": "learner",
    "ray::Evaluator": "evaluator", "ray::QueueService": "queue",
    "ray::ServeReplica": "reward replica",
}  # fmt: skip


class OutsideRun:
    """`python -m cluster train PRESET …`, started, looked at, killed."""

    def __init__(self, preset: str, settings: Sequence[str], folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.directory = folder / name
        shutil.rmtree(self.directory, ignore_errors=True)  # of an earlier record
        folder.mkdir(parents=True, exist_ok=True)
        self.command = [
            sys.executable, "-m", "cluster", "train", preset, *settings,
            f"run.dir={folder}", f"run.name={name}",
        ]  # fmt: skip
        self.log = folder / f"{name}.log"
        self.started = time.monotonic()
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        with self.log.open("ab") as out:
            return subprocess.Popen(self.command, stdout=out, stderr=out, env=environment)

    def again(self) -> None:
        """The same command once more."""
        self.process = self._start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def family(self) -> list[psutil.Process]:
        """Every process below the driver."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def parts(self) -> list[psutil.Process]:
        """Processes of the run's parts, by Ray's titles; in the order of their ids."""
        return sorted((p for p in self.family() if part(p)), key=lambda p: p.pid)

    def step(self) -> int:
        """The last step in metrics.jsonl, 0 without one."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue
        return 0

    def wait_for_step(self, step: int, seconds: float) -> bool:
        """Until the run has got so far; False where it ended before. TimeoutError after that."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if self.step() >= step:
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} is at step {self.step()}, not {step}")
            time.sleep(0.1)
        return False

    def finish(self, seconds: float) -> dict[str, Any]:
        """Wait for its end; returns its summary. RuntimeError with its last words without one."""
        self.process.wait(seconds)
        path = self.directory / "summary.json"
        if not path.exists():
            words = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"{self.name} ended without a summary: {' / '.join(words)}")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary


def split(overrides: Sequence[str], names: Container[str]) -> tuple[dict[str, str], list[str]]:
    """What is given for a bench's own settings, by name, and the rest, which are the run's."""
    own, rest = {}, []
    for text in overrides:
        name, _, value = text.partition("=")
        if name in names:
            own[name] = value
        else:
            rest.append(text)
    return own, rest


def own_settings(
    overrides: Sequence[str], defaults: dict[str, N], least: int = 0
) -> tuple[dict[str, N], list[str]]:
    """A bench's own settings, numbers of the defaults' types, and the overrides that are the run's.

    ConfigError, in one line, for what is no such number, or is below `least`.
    """
    given, rest = split(overrides, defaults)
    own = dict(defaults)
    for name, value in given.items():
        try:
            own[name] = type(own[name])(value)
            usable = own[name] >= least
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(name, value, "not such a number", f"set {name}={defaults[name]}")
    return own, rest


def title(process: psutil.Process) -> str:
    """A process's title, empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def part(process: psutil.Process) -> str:
    """What part of a run a process is; empty where it is none."""
    named = title(process)
    return next((part for start, part in OURS.items() if named.startswith(start)), "")


def write(name: str, record: dict[str, Any]) -> Path:
    """Keep a record under runs/bench/."""
    from cluster.run_directory import describe_environment

    return results.write(name, {"environment": describe_environment(), **record})
