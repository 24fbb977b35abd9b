"""`python -m cluster pipeline PRESET`: every stage that a preset names, in order, then the run.

A stage writes a directory under `run.dir`, named in the `pipeline` section, and is done once: a
second call goes on after the last one that is finished, and presets that name the same directory
share what is in it. Settings say where a stage's output goes by its name in braces:

    sft.path: "{data}/sft.jsonl"    policy.path: "{sft}/hf"    reward.path: "{reward_model}/hf"
"""

import copy
import operator
import re
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cluster import mirror
from configs.bounds import leaves
from configs.errors import ConfigError
from configs.load import prepare
from configs.schema import Config
from configs.schema_stages import PipelineConfig

STAGES = tuple(f.name for f in fields(PipelineConfig) if f.name != "seed")
_NAMED = re.compile(r"\{(\w+)\}")


def pipeline(preset: str, settings: list[str]) -> dict[str, Any]:
    """Run a preset's stages and its training, and judge what came of it; returns a summary of each.

    The run's name is the preset's, unless one is given, so that the same command goes on where it
    stopped. ValueError before anything starts where settings cannot work; RuntimeError where a
    stage fails, which names it.
    """
    from cluster import run_directory
    from cluster.stages import judge
    from cluster.train import train

    config = prepare(preset, settings)
    config.run.name = config.run.name or Path(preset).stem
    mirror.check(config)
    config = run_stages(config)
    run = Path(config.run.dir) / config.run.name
    mirror.meet(config, run)
    summary = run_directory.finished(run) or train(config, config.run.name)
    done = {"train": summary}
    if summary["status"] == "finished":
        done["evaluate"] = judge.evaluate(run, [])
    return done


def run_stages(config: Config) -> Config:
    """Run the stages that come before training, as far as they are not finished; returns the
    settings with their directories filled in."""
    earlier = named(replace(config, seed=config.pipeline.seed))
    for name in STAGES:
        if directory := directories(config)[name]:
            began = time.monotonic()
            _RUN[name](earlier, directory)
            print(f"{name}: {directory}, {time.monotonic() - began:.0f} s", flush=True)
    return named(config)


def directories(config: Config) -> dict[str, Path | None]:
    """Where each stage writes; None for those that the preset does without."""
    given = {name: getattr(config.pipeline, name) for name in STAGES}
    return {name: Path(config.run.dir) / d if d else None for name, d in given.items()}


def named(config: Config) -> Config:
    """The settings with `{stage}` replaced by the stage's directory. ConfigError for a stage that
    the preset does not name."""
    found, out = directories(config), copy.deepcopy(config)
    for key, value in leaves(config):
        if isinstance(value, str) and (names := _NAMED.findall(value)):
            for name in names:
                if found.get(name) is None:
                    raise ConfigError(key, value, f"there is no stage {name!r} in this preset",
                                      f"set pipeline.{name}, or name a file")  # fmt: skip
            section, _, name = key.rpartition(".")
            filled = _NAMED.sub(lambda m: str(found[m[1]]), value)
            setattr(operator.attrgetter(section)(out), name, filled)
    return out


def _data(config: Config, directory: Path) -> None:
    from learner.stages import length_data

    length_data.write(directory, config)


def _supervised(kind: Any) -> Callable[[Config, Path], None]:
    def run(config: Config, directory: Path) -> None:
        from cluster.stages.stage import run_stage

        summary = run_stage(config, kind, directory)
        if summary["status"] != "finished":
            raise RuntimeError(f"{kind} {summary['status']}: {summary['failure'] or directory}")

    return run


def _label(config: Config, directory: Path) -> None:
    from cluster.stages.label import label

    label(config, directory, config.gold)


_RUN: dict[str, Callable[[Config, Path], None]] = {
    "data": _data, "sft": _supervised("sft"), "label": _label,
    "reward_model": _supervised("reward_model"),
}  # fmt: skip
