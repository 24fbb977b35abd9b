"""The line: groups that are issued and in no round yet, in issue order.

Rounds are taken off its head, so a group that fails leaves no hole: the next one moves up, and one
more prompt is issued. Leases of dead actors are issued again under the same ids.
"""

import time
from collections import deque

from actors.actor import Lease
from actors.rollout import OFFLINE_STEP, STATUS_NAMES, VALID, GroupId, Rollouts, Version
from learner.replay.ledger import Ledger
from learner.replay.records import Held
from learner.replay.staleness import Plan


class QueueError(RuntimeError):
    """The queue refuses, or cannot go on; the message says which and why."""


class TooManyFailures(QueueError):
    """More rollouts fail than `limits.failure_rate` allows."""


class Line:
    """Issues leases and takes what comes of them, until a round takes it away.

    committed, step: batches done, and optimizer steps made of them, as admission counts.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, min_valid: int, failure_rate: float, window: int
    ) -> None:
        self.plan, self.ledger = plan, ledger
        self.min_valid, self.failure_rate = min_valid, failure_rate
        self.groups: dict[GroupId, Held | None] = {}  # None: in flight
        self.leases: dict[int, tuple[Lease, int, float]] = {}  # lease, actor, since
        self.rounds_taken = 0
        self.last_failure = ""
        self._next_position = self._next_lease = 0
        self._orphans: deque[Lease] = deque()
        self._outcomes: deque[bool] = deque(maxlen=window)

    def lease(
        self, actor: int, version: Version, weights: object, committed: int, step: int
    ) -> Lease | None:
        """The next prompts, to be generated under this version; None while none is admitted."""
        if self._orphans:
            groups = self._orphans.popleft().groups
        else:
            groups = self._issue(version, committed, step)
        if not groups:
            return None
        lease = Lease(self._next_lease, groups, version, weights)
        self._next_lease += 1
        self.leases[lease.id] = (lease, actor, time.monotonic())
        return lease

    def _issue(self, version: Version, committed: int, step: int) -> tuple[GroupId, ...]:
        """New prompts for the first round that still lacks some, if it may start now."""
        per_round = self.plan.groups_per_round
        live = self.rounds_taken * per_round + len(self.groups)
        round_ = live // per_round
        if not self.plan.admits(round_, committed, step, version.step):
            return ()
        count = min(self.plan.lease, per_round - live % per_round)
        groups = tuple(GroupId(self._next_position + i, 0) for i in range(count))
        self._next_position += count
        self.groups.update(dict.fromkeys(groups))
        self.ledger.issue(count * self.plan.members)
        return groups

    def put(self, lease: Lease, block: Rollouts) -> None:
        """Take a lease's groups, all members terminal; those that are known already are ignored."""
        self.leases.pop(lease.id, None)
        for place, group in enumerate(block.ids()):
            if group in self.groups and self.groups[group] is None:
                self._enter(group, block, place)

    def _enter(self, group: GroupId, block: Rollouts, place: int) -> None:
        rows = slice(place * block.members, (place + 1) * block.members)
        status_C = block.status_N[rows]
        valid_C = status_C == VALID
        self._outcomes.extend(valid_C.tolist())
        for status in status_C[~valid_C]:
            self.ledger.retire_in_flight(STATUS_NAMES[int(status)], 1)
        if not valid_C.all():
            self.last_failure = next(
                why for r, why in block.failures.items() if rows.start <= r < rows.stop
            )
        if valid_C.sum() < self.min_valid:
            self.ledger.retire_in_flight("group_incomplete", int(valid_C.sum()))
            del self.groups[group]
            return
        self.ledger.enter(int(valid_C.sum()))
        oldest_C = block.select(place, place + 1).oldest_step_N()
        self.groups[group] = Held(block, place, time.monotonic(), valid_C, oldest_C)

    def release(self, actor: int) -> int:
        """Leases of a dead actor are to be issued again, under the same ids; their number."""
        dead = [id_ for id_, (_, owner, _) in self.leases.items() if owner == actor]
        self._orphans.extend(self.leases.pop(id_)[0] for id_ in dead)
        return len(dead)

    def check_failures(self) -> None:
        """Raise TooManyFailures when the last rollouts failed more often than allowed."""
        seen = len(self._outcomes)
        failed = seen - sum(self._outcomes)
        if seen == self._outcomes.maxlen and failed > self.failure_rate * seen:
            raise TooManyFailures(
                f"{failed} of the last {seen} rollouts failed, over limits.failure_rate="
                f"{self.failure_rate}; the last one: {self.last_failure}"
            )

    def take(self, round_: int, committed: int, step: int) -> dict[GroupId, Held] | None:
        """The round's groups off the line's head, in order; None unless they are all there.

        In ready order it is the first that are there, without those that would get too old.
        """
        wanted = self.plan.groups_per_round
        if self.plan.ready_order:
            self._expire(round_, committed, step)
            ids = [group for group, held in self.groups.items() if held is not None][:wanted]
        else:
            ids = [group for _, group in zip(range(wanted), self.groups)]
        taken = {group: held for group in ids if (held := self.groups[group]) is not None}
        if len(taken) < wanted:
            return None
        for group in ids:
            del self.groups[group]
        self.rounds_taken += 1
        return taken

    def _expire(self, round_: int, committed: int, step: int) -> None:
        """Retire groups whose last consumption in this round would be over the budget."""
        for group, held in list(self.groups.items()):
            if held is None or held.oldest == OFFLINE_STEP:
                continue
            if self.plan.last_age(round_, committed, step, held.oldest) > self.plan.max_age:
                self.ledger.retire_queued("expired", held.valid)
                del self.groups[group]

    def missing(self) -> str:
        """What the next round waits for, in words."""
        now = time.monotonic()
        held = [
            f"positions {lease.groups[0].position}–{lease.groups[-1].position} with actor {actor}"
            f" for {now - since:.0f} s"
            for lease, actor, since in self.leases.values()
        ]
        if self._orphans:
            held.append(f"{len(self._orphans)} leases of dead actors, not yet taken up again")
        ready = sum(group is not None for group in self.groups.values())
        where = "; ".join(held) or "no prompt is leased: every actor is starting, or gone"
        return f"{ready} of {self.plan.groups_per_round} groups of its round; {where}"
