"""How often a part may be restarted, and how long to wait before it."""

LONGEST_PAUSE = 30.0  # seconds


class RestartsUsedUp(RuntimeError):
    """A part failed more often than its limit allows."""


class Restarts:
    """Counts a part's restarts; the pause before one doubles from `first_pause` on."""

    def __init__(self, part: str, setting: str, limit: int, first_pause: float) -> None:
        self.part, self.setting, self.limit = part, setting, limit
        self.first_pause = first_pause
        self.number = 0

    def count(self, why: str) -> float:
        """One more; returns the seconds to wait first. RestartsUsedUp when that is too many."""
        self.number += 1
        if self.number > self.limit:
            raise RestartsUsedUp(
                f"{self.part} failed, and {self.setting}={self.limit} restarts are used up: {why}"
            )
        return min(LONGEST_PAUSE, self.first_pause * 2.0 ** (self.number - 1))


def reason(error: BaseException) -> str:
    """An error in one line, Ray's wrapping taken off."""
    cause = root(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:500]


def root(error: BaseException) -> BaseException:
    """The error that Ray carried from another process."""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    return error
