"""The queue's clocks: how long actors wait, and how long nothing has happened at all."""

import time


class Stalls:
    """Seconds by `time.monotonic()`."""

    def __init__(self) -> None:
        self._actors: dict[tuple[int, int], list[float]] = {}  # (actor, slot): first call, waited
        self._progress = self._committed = time.monotonic()
        self._handed: tuple[int, float] = (-1, 0.0)  # a batch, and since when a rank has it

    def called(self, actor: int, slot: int) -> float:
        """An actor asks for a lease; returns now."""
        now = time.monotonic()
        self._actors.setdefault((actor, slot), [now, 0.0])
        return now

    def answered(self, actor: int, slot: int, since: float) -> None:
        """It has its answer."""
        self._actors[actor, slot][1] += time.monotonic() - since

    def idle_fraction(self) -> float | None:
        """Share of actors' time, since their first call, that they waited for a lease."""
        now = time.monotonic()
        total = sum(now - first for first, _ in self._actors.values())
        waited = sum(seconds for _, seconds in self._actors.values())
        return min(1.0, waited / total) if total else None

    def progress(self) -> None:
        """Something went forward: a lease, a put, a commit."""
        self._progress = time.monotonic()

    def silent(self) -> float:
        """Seconds since something went forward."""
        return time.monotonic() - self._progress

    def handed_out(self, number: int) -> None:
        """A rank has got its slice of a batch."""
        if number != self._handed[0]:
            self._handed = (number, time.monotonic())

    def committed(self) -> None:
        """A rank has reported on a batch."""
        self._committed = time.monotonic()

    def in_hand(self, committed: int) -> float:
        """Seconds that ranks have sat on the batch after `committed`; 0 where they have none."""
        number, since = self._handed
        return time.monotonic() - max(since, self._committed) if number >= committed else 0.0
