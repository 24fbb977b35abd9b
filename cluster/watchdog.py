"""Watching over a run: what hangs is ended, what stands still is named and written down. What it
is asked for meanwhile (`cluster.scale`) is done."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from cluster import scale
from cluster.parts import Parts, QueueSilent
from cluster.run_directory import RunDirectory
from cluster.saver import Saver
from configs.schema import Config
from learner.replay.line import TooManyFailures

DUMP = "stall.json"


class LearnerLost(RuntimeError):
    """A learner rank died or hangs, and has to be started again."""


class Stalled(RuntimeError):
    """Nothing went forward for `limits.stall_seconds`."""


def is_fatal(error: BaseException) -> bool:
    """Whether to go back to a checkpoint would not help."""
    return any(
        isinstance(e, TooManyFailures) or "limits.failure_rate" in str(e) for e in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    while True:
        yield error
        cause = getattr(error, "cause", None)
        if not isinstance(cause, BaseException) or cause is error:
            return
        error = cause


class Watchdog:
    """Looks at the queue's status, now and then, and does what it calls for."""

    def __init__(
        self, config: Config, parts: Parts, saver: Saver, directory: RunDirectory,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.limits, self.parts, self.saver = config, config.limits, parts, saver
        self.directory, self.say = directory, say
        self._since = time.monotonic()

    def begin(self) -> None:
        """The learner is about to be asked for batches."""
        self._since = time.monotonic()

    def look(self) -> dict[str, Any]:
        """Restart rollout actors that died or hang; returns the queue's status, empty where it
        does not answer. LearnerLost where the learner dies or hangs, Stalled where nothing explains
        why the run stands still."""
        try:
            status = self.parts.status()
        except QueueSilent as error:
            self.say(str(error))
            return {}
        assert self.parts.fleet is not None
        for line in self.parts.fleet.watch(status["actors"]):
            self.say(line)
        scale.obey(self.directory.path, self.config, self.parts.fleet, self.say)
        self.saver.look_at_journal(status)
        asked = time.monotonic() - self._since  # what was before does not count
        if min(status["in_hand"], asked) > self.limits.step_seconds:
            raise LearnerLost(f"no step in {self.limits.step_seconds:g} s: a rank hangs")
        if min(status["silent"], asked) > self.limits.stall_seconds:
            self._dump(status)
            raise Stalled(
                f"nothing went forward for {self.limits.stall_seconds:g} s "
                f"({DUMP} has the state): {status['missing']}"
            )
        return status

    def _dump(self, status: dict[str, Any]) -> None:
        """What every part was at, for people."""
        fleet = self.parts.fleet
        seconds = self.limits.wait_seconds
        try:
            report = ray.get(self.parts.queue.report.remote(), timeout=seconds)
        except (ray.exceptions.RayError, TimeoutError) as error:
            report = {"missing": str(error)}
        state = {
            "queue": status,
            "report": report,
            "actors": {
                "running": sorted(fleet.running.values()) if fleet else [],
                "to_be_restarted": sorted(fleet.due) if fleet else [],
                "restarts": fleet.restarts.number if fleet else 0,
            },
        }
        text = json.dumps(state, indent=2, default=str)
        (self.directory.path / DUMP).write_text(text + "\n", encoding="utf-8")
