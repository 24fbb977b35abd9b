"""How often a part may be restarted, and how long to wait before it."""

import time

LONGEST_PAUSE = 30.0  # seconds
LASTED = 10.0  # times the last pause, after which a part is taken to have worked


class RestartsUsedUp(RuntimeError):
    """A part failed more often than its limit allows."""


class Restarts:
    """Counts a part's restarts. The pause before one doubles from `first_pause` on, as long as the
    part does not last: it is short again once the part worked for LASTED times the pause."""

    def __init__(self, part: str, setting: str, limit: int, first_pause: float) -> None:
        self.part, self.setting, self.limit = part, setting, limit
        self.first_pause = first_pause
        self.number = 0
        self._pause, self._again = first_pause / 2.0, 0.0  # the last one, and when it was over

    def count(self, why: str) -> float:
        """One more; returns the seconds to wait first. RestartsUsedUp when that is too many."""
        self.number += 1
        if self.number > self.limit:
            raise RestartsUsedUp(
                f"{self.part} failed, and {self.setting}={self.limit} restarts are used up: {why}"
            )
        lasted = time.monotonic() - self._again
        longer = self._pause if lasted < LASTED * self._pause else self.first_pause / 2.0
        self._pause = min(LONGEST_PAUSE, 2.0 * longer)
        self._again = time.monotonic() + self._pause
        return self._pause


def reason(error: BaseException) -> str:
    """An error in one line, Ray's wrapping taken off."""
    cause = root(error)
    text = str(cause).split("Some common causes")[0]  # Ray's guesses, in half a page
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:500]


def root(error: BaseException) -> BaseException:
    """The error that Ray carried from another process."""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    return error
