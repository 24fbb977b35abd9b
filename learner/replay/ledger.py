"""The account of every rollout ever issued (law 1): issued = in_flight + queued + retired."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

REASONS = (
    "exhausted",
    "expired",
    "evicted",
    "generation_failed",
    "reward_failed",
    "group_incomplete",
    "rolled_back",
    "quarantined",
    "lost",
)


@dataclass
class Ledger:
    """Counts of rollouts by state, and of committed consumptions by age and reuse.

    in_flight: leased to an actor, awaiting generation or score. queued: scored, until retired;
    what the learner holds uncommitted included. The histograms count valid rollouts once per
    committed consumption; offline rollouts have a reuse and no age.
    """

    issued: int = 0
    in_flight: int = 0
    queued: int = 0
    retired: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    age: Counter[int] = field(default_factory=Counter)
    reuse: Counter[int] = field(default_factory=Counter)

    def issue(self, rollouts: int) -> None:
        """Rollouts are leased for the first time."""
        self.issued += rollouts
        self.in_flight += rollouts

    def enter(self, rollouts: int) -> None:
        """Scored rollouts enter the queue."""
        self.in_flight -= rollouts
        self.queued += rollouts

    def retire_in_flight(self, reason: str, rollouts: int) -> None:
        """Rollouts end before they were queued."""
        self.in_flight -= rollouts
        self._retire(reason, rollouts)

    def retire_queued(self, reason: str, rollouts: int) -> None:
        """Queued rollouts end."""
        self.queued -= rollouts
        self._retire(reason, rollouts)

    def _retire(self, reason: str, rollouts: int) -> None:
        assert reason in REASONS, reason
        self.retired[reason] += rollouts

    @property
    def balanced(self) -> bool:
        """Whether the law of conservation holds."""
        counts = (self.in_flight, self.queued, *self.retired.values())
        return min(counts) >= 0 and self.issued == sum(counts)

    def counts(self) -> dict[str, Any]:
        """issued, in_flight, queued, and retired by reason."""
        assert self.balanced, self
        return {
            "issued": self.issued,
            "in_flight": self.in_flight,
            "queued": self.queued,
            "retired": dict(self.retired),
        }


def describe_histogram(histogram: Counter[int]) -> dict[str, Any]:
    """mean, max and the value → count table of a histogram; mean and max None when empty."""
    total = sum(histogram.values())
    mean = sum(v * n for v, n in histogram.items()) / total if total else None
    table = {str(value): histogram[value] for value in sorted(histogram)}
    return {"mean": mean, "max": max(histogram, default=None), "histogram": table}
