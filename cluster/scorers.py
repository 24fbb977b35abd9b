"""Whose scores a run has: the identities of its reward and gold reward, kept in its directory."""

import json
import os
from pathlib import Path

from configs.choices import Resume
from configs.errors import ConfigError
from configs.schema import Config
from reward_server.rewards import describe

FILE = "scorers.json"


def keep(directory: Path, config: Config) -> None:
    """Write the identities of `reward` and `gold` beside config.yaml.

    ConfigError where the directory's run has scores of others, under settings that are the same: a
    reward model's files have changed. `resume=changed` goes on so; each rollout says whose its
    score is.
    """
    now = {name: describe(getattr(config, name)) for name in ("reward", "gold")}
    before = kept(directory)
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if changed and config.resume is not Resume.changed:
        name = changed[0]
        problem = f"its files have changed: {_hash(before[name])} → {_hash(now[name])}"
        fix = "put the old ones back, or resume=changed to go on so, or take another run.name"
        raise ConfigError(f"{name}.path", getattr(config, name).path, problem, fix)
    beside = directory / f"{FILE}.part"
    beside.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, directory / FILE)


def kept(directory: Path) -> dict[str, str]:
    """Identities of a run's `reward` and `gold`, the latter empty where there is none."""
    try:
        value = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _hash(identity: str) -> str:
    """The end of a reward model's identity."""
    return identity.rpartition(", ")[2].rstrip(")")
