"""What a run directory holds, read with patience: any file may be missing, or cut off at its end.

A run that is still going, or was killed, has no summary; one is then made of its metrics lines.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cluster.report.tally import Tally

SCALARS = (
    "step", "reward_mean", "reward_eval", "reward_eval_error", "reward_gold",
    "reward_gold_error", "kl_to_generator",
    "kl_from_generator", "kl_to_reference", "eval_kl_to_reference", "loss", "ess",
)  # fmt: skip
FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "environment.json")
SAMPLES = 24  # rollouts shown

History = dict[str, list[float]]  # a column a metric; NaN where a line lacks it


@dataclass
class Run:
    """A run directory's content. `complete`: it has a summary of its own."""

    name: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    samples: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def steps_per_round(self) -> int | None:
        """S = T·B/M, where the configuration tells."""
        try:
            replay, learner = self.config["replay"], self.config["learner"]
            return int(replay["inner_epochs"] * replay["samples_per_round"] // learner["minibatch"])
        except (KeyError, TypeError, ZeroDivisionError):
            return None


def read(directory: Path) -> Run:
    """Read a run directory.

    Raises FileNotFoundError if it is none, or has none of a run's files.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no run directory at {directory}")
    if not any((directory / name).is_file() for name in FILES):
        raise FileNotFoundError(f"{directory} is not a run: it has none of {', '.join(FILES)}")
    run = describe(directory)
    tally = None if run.complete else Tally()
    run.history = _history(directory / "metrics.jsonl", tally, run.notes)
    if tally:
        run.summary = tally.summary()
        run.notes.insert(
            0,
            "There is no summary.json: the run is still going, or was killed. "
            "Numbers are from the metrics lines so far: means over them, and the last KL to π_ref.",
        )
    run.samples = _spread(list(_json_lines(directory / "samples.jsonl", run.notes)))
    return run


def describe(directory: Path) -> Run:
    """What a run directory says of its run without metrics lines and samples."""
    run = Run(directory.resolve().name)
    run.config_text = _text(directory / "config.yaml")
    run.config = _config(run.config_text)
    run.environment = _object(directory / "environment.json")
    run.summary = _object(directory / "summary.json")
    run.complete = bool(run.summary)
    run.name = str(run.summary.get("name") or run.name)
    if run.summary.get("failure"):
        run.notes.append(f"The run failed: {run.summary['failure']}")
    return run


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, cut off or something else."""
    try:
        value = json.loads(_text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _config(text: str) -> dict[str, Any]:
    try:
        value = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (YAMLError, OmegaConfBaseException, ValueError):  # the text is shown all the same
        return {}
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; lines that are not, as one cut off, are counted in `notes`."""
    if not path.is_file():
        notes.append(f"There is no {path.name}.")
        return
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                unreadable += bool(text.strip())
                continue
            if isinstance(line, dict):
                yield line
    if unreadable:
        plural = "" if unreadable == 1 else "s"
        notes.append(f"{unreadable} unreadable line{plural} of {path.name} left out.")


def _history(path: Path, tally: Tally | None, notes: list[str]) -> History:
    history: History = {name: [] for name in SCALARS}
    for line in _json_lines(path, notes):
        if tally:
            tally.add(line)
        for name in SCALARS:
            value = line.get(name)
            history[name].append(float(value) if isinstance(value, (int, float)) else float("nan"))
    return history


def _spread(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SAMPLES lines, evenly from the first to the last."""
    if len(lines) <= SAMPLES:
        return lines
    return [lines[round(i * (len(lines) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]
