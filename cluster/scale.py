"""More or fewer rollout actors for a run that goes on.

A file in the run's directory is the way: the command leaves `scale.json` there, the run's driver
takes it within a second and leaves `scaled.json`, which a resumed run reads, too. So it works over
whatever storage the directory is on, and opens no port.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from configs.errors import ConfigError
from configs.load import load
from configs.schema import Config
from configs.validate import check

ASKED, DONE = "scale.json", "scaled.json"
ANSWER_SECONDS = 30.0
MOST = 1_000  # actors, in case of a slip of the hand
POLL_SECONDS = 0.1


class Scalable(Protocol):
    """What is scaled, `cluster.fleet.Fleet`."""

    def scale(self, actors: int) -> str: ...


def ask(run: Path, actors: int, seconds: float = ANSWER_SECONDS) -> str:
    """Ask a run's driver for so many rollout actors; returns what it did, in a line.

    ValueError where the folder is no run's, the run is over, its settings do not go with so many,
    or nobody answers in time; nothing is left behind then.
    """
    if not (run / "config.yaml").exists():
        raise ConfigError("run", run, "is no run's directory", "name one, as runs/bandit-1")
    if (run / "summary.json").exists():
        raise ConfigError("run", run, "is over", "start it again with rollout.actors set")
    _fits(load(str(run / "config.yaml"), []), actors)
    mine = time.time_ns()
    _write(run / ASKED, {"actors": actors, "asked": mine})
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (answer := _read(run / DONE) or {}).get("asked") == mine:
            return str(answer.get("said", ""))
        time.sleep(POLL_SECONDS)
    (run / ASKED).unlink(missing_ok=True)
    problem = f"no driver took it for {seconds:g} s: the run is starting, or not running"
    raise ConfigError("run", run, problem, "try again once the run says that it is ready")


def obey(run: Path, config: Config, fleet: Scalable, say: Callable[[str], None]) -> None:
    """The driver's part: do what was asked for, if anything was, and say so there and here."""
    if not (run / ASKED).exists():
        return
    request = _read(run / ASKED) or {}
    asked = request.get("actors")
    (run / ASKED).unlink(missing_ok=True)
    try:
        if not isinstance(asked, int) or isinstance(asked, bool):
            raise ConfigError("actors", asked, "is no number of actors", f"see {ASKED}")
        _fits(config, asked)
    except ConfigError as error:
        say(f"not scaled: {error}")
        return
    said = fleet.scale(asked)
    say(said)
    _write(run / DONE, {**request, "said": said})


def actors(run: Path, config: Config) -> int:
    """The number that a run starts with: what was last asked for, else `rollout.actors`."""
    number = (_read(run / DONE) or {}).get("actors")
    return number if isinstance(number, int) and number > 0 else config.rollout.actors


def _fits(config: Config, actors: int) -> None:
    """ConfigError where the run's settings do not allow so many."""
    if actors > MOST:
        raise ConfigError("rollout.actors", actors, f"is over {MOST}", f"ask for {MOST} or fewer")
    before, config.rollout.actors = config.rollout.actors, actors
    try:
        check(config)
    finally:
        config.rollout.actors = before


def _read(path: Path) -> dict[str, object] | None:
    """A JSON object from a file; empty where it holds none, None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, object]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(beside, path)
