"""The clock of a run's start: when each step of it was done, for summary.json."""

import time
from typing import Any


class Startup:
    """Seconds since the run was asked for, by what was there then, in the order it came."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._unix = time.time()
        self._seconds: dict[str, float] = {}

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began

    def mark(self, what: str) -> None:
        """This is there now; said again, it stays as it was."""
        self._seconds.setdefault(what, round(self.spent, 3))

    def record(self) -> dict[str, Any]:
        """began: unix time; seconds since then until each step was done.

        `inputs` read and checked, `ray` connected, `asked`: every process is asked for,
        `rewards` are served, `learner` holds π_ref and has published it, `actors` have their
        engines, `first_update` is written down.
        """
        return {"began": self._unix, "seconds": dict(self._seconds)}
