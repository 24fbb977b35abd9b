"""The queue's clocks: how long actors wait, and how long nothing has happened at all."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Stalls:
    """Seconds by `time.monotonic()`."""

    def __init__(self) -> None:
        self._actors: dict[tuple[int, int], list[float]] = {}  # (actor, slot): first call, waited
        self._heard: dict[int, float] = {}  # when an actor last called, or was answered
        self._waiting: dict[int, set[float]] = {}  # actor: since when its calls for a lease wait
        self._progress = self._learner = time.monotonic()
        self._asking: Counter[int] = Counter()  # batches that ranks wait for

    def called(self, actor: int, slot: int) -> float:
        """An actor asks for a lease; returns now."""
        now = time.monotonic()
        self._actors.setdefault((actor, slot), [now, 0.0])
        self._waiting.setdefault(actor, set()).add(now)
        self.heard(actor)
        return now

    def answered(self, actor: int, slot: int, since: float) -> None:
        """It has its answer."""
        if (actor, slot) in self._actors:  # not where it was dismissed meanwhile
            self._actors[actor, slot][1] += time.monotonic() - since
        if actor in self._waiting:  # not where it was taken for dead meanwhile
            self._waiting[actor].discard(since)
            self.heard(actor)

    def heard(self, actor: int) -> None:
        """An actor is alive."""
        self._heard[actor] = time.monotonic()

    def forget(self, actor: int) -> None:
        """It is not any more."""
        self._heard.pop(actor, None)
        self._waiting.pop(actor, None)

    def dismiss(self, actor: int) -> None:
        """It is not wanted any more; its waiting counts no longer."""
        self.forget(actor)
        self._actors = {key: spent for key, spent in self._actors.items() if key[0] != actor}

    def quiet(self) -> dict[int, float]:
        """Seconds since each actor was heard of; none of one that waits for a lease, however
        long."""
        now = time.monotonic()
        return {a: 0.0 if self._waiting.get(a) else now - h for a, h in self._heard.items()}

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

    @contextmanager
    def asking(self, number: int) -> Iterator[None]:
        """A rank waits for a batch."""
        self._asking[number] += 1
        try:
            yield
        finally:
            self._asking[number] -= 1
            self._learner = time.monotonic()

    def committed(self) -> None:
        """A rank has reported on a batch."""
        self._learner = time.monotonic()

    def in_hand(self, committed: int) -> float:
        """Seconds since the learner was last heard of; 0 while it waits for its next batch."""
        return 0.0 if self._asking[committed] > 0 else time.monotonic() - self._learner
