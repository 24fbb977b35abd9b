"""A trial: one run of a study, and how it ended."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.stages import pipeline
from cluster.study.spec import Cell, Study
from configs.bounds import leaves
from configs.schema import Config

TRAINING = ["checkpoint.every=0", "checkpoint.seconds=0", "resume=never", "run.samples_per_round=0"]


@dataclass(frozen=True)
class Trial:
    """One run: a cell, a seed, a learning rate; or None for the settings' own, and 0 updates."""

    cell: Cell = field(hash=False)
    seed: int
    rate: float | None = None
    updates: int = 0

    def __str__(self) -> str:
        named = [f"{axis} {label}" for axis, label in self.cell.items()]
        rate = [f"lr {self.rate:g}"] if self.rate is not None else []
        updates = [f"{self.updates} updates"] if self.updates else []
        return ", ".join([*named, f"seed {self.seed}", *rate, *updates])

    def config(self, study: Study, folder: Path, stages: Path | None = None) -> Config:
        """Its settings, with a name made of them, so that equal trials are one run.

        stages: under which the directories of `pipeline.*` are; None: `folder`.
        """
        more = [*TRAINING, f"seed={self.seed}", f"run.dir={folder}"]
        more += [f"learner.lr={self.rate}"] if self.rate is not None else []
        more += [f"learner.updates={self.updates}"] if self.updates else []
        config = study.prepare(self.cell, *more)
        config.run.name, config.run.dir = "", ""
        digest = _digest(config)
        config.run.dir = str((stages or folder).resolve())
        config = pipeline.named(config)
        words = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(self.cell.values())).strip("-")
        config.run.name = f"{words or study.name}-{self.seed}-{digest}"
        config.run.dir = str(folder.resolve())
        return config


@dataclass
class Outcome:
    """How a trial ended. folder: its run directory; rows: its evaluations, as `results.rows` has
    them; failure: why there are none."""

    trial: Trial
    folder: Path
    rate: float
    rows: list[dict[str, Any]]
    failure: str = ""


def _digest(config: Config) -> str:
    """Of the settings that are not the schema's: a setting that is new there keeps old trials."""
    usual = dict(leaves(Config()))
    own = {key: str(value) for key, value in leaves(config) if value != usual[key]}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:10]
