"""Who is in the group that weights are pushed to: the state, and what follows from each event.

    joined, left ──▶ alive    whom the fleet runs
    linked                    whom the communicator of this epoch reaches; nobody: there is none

    next(present): alive and present = linked   → KEEP: send over the communicator there is
                   another set                  → REBUILD: abandon it, epoch + 1, link those
                   nobody                       → NOBODY: nothing is sent
    broken():      a rebuild or a send failed   → linked = nobody, so the next one rebuilds

A communicator knows its members by rank and can neither lose nor gain one, so every change makes a
new one, under a new epoch. Whoever is not reached takes the version's weights by host when it
leases. Nothing here waits, communicates or knows of threads; `learner.transfer` does.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple


class Member(NamedTuple):
    """A rollout actor's process: a restarted one is another member."""

    actor: int
    incarnation: int


class Plan(Enum):
    KEEP = "keep"
    REBUILD = "rebuild"
    NOBODY = "nobody"


@dataclass(frozen=True)
class Membership:
    """The state, immutable: each event gives the next one."""

    epoch: int = 0  # of the communicator; goes up with every rebuild
    alive: frozenset[Member] = frozenset()
    linked: frozenset[Member] = frozenset()
    joins: int = 0

    def joined(self, actor: int) -> "Membership":
        """A process of this actor is there; the one before it, if any, is not."""
        member = Member(actor, self.joins)
        return replace(self.left(actor), alive=self.left(actor).alive | {member},
                       joins=self.joins + 1)  # fmt: skip

    def left(self, actor: int) -> "Membership":
        """The actor's process is gone."""
        return replace(self, alive=frozenset(m for m in self.alive if m.actor != actor))

    def next(self, present: frozenset[Member]) -> Plan:
        """What to do before a send. present: members that have just answered."""
        members = self.alive & present
        if not members:
            return Plan.NOBODY
        return Plan.KEEP if members == self.linked else Plan.REBUILD

    def rebuilding(self, present: frozenset[Member]) -> "Membership":
        """A new communicator is about to reach those that are present."""
        return replace(self, epoch=self.epoch + 1, linked=self.alive & present)

    def broken(self) -> "Membership":
        """The communicator is of no use any more."""
        return replace(self, linked=frozenset())
