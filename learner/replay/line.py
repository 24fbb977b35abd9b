"""The line: groups that are issued and in no round yet, in issue order.

Rounds are taken off its head, so a group that fails leaves no hole: the next one moves up, and one
more prompt is issued. Leases of dead actors are issued again under the same ids; a group made by
weights that a learner restart undid keeps its place and comes again as the next incarnation.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass, replace

import numpy as np

from actors.actor import Lease
from actors.rollout import OFFLINE_STEP, STATUS_NAMES, VALID, GroupId, Rollouts, Version
from learner.replay.ledger import Ledger
from learner.replay.lineage import Lineages
from learner.replay.records import Held
from learner.replay.staleness import Plan


class QueueError(RuntimeError):
    """The queue refuses, or cannot go on; the message says which and why."""


class TooManyFailures(QueueError):
    """More rollouts fail than `limits.failure_rate` allows."""


@dataclass
class Taken:
    """A lease that an actor has in hand, in one of its slots."""

    lease: Lease
    actor: int
    slot: int
    since: float  # time.monotonic()


@dataclass(frozen=True)
class Rules:
    """What the line does about failures."""

    min_valid: int  # members that a group needs
    failure_rate: float  # of the last `window` rollouts; above it the run stops
    window: int
    attempts: int = 3  # of a prompt whose actors die, before it is quarantined


class Line:
    """Issues leases and takes what comes of them, until a round takes it away.

    committed, step: batches done, and optimizer steps made of them, as admission counts.
    """

    def __init__(self, plan: Plan, ledger: Ledger, rules: Rules, lineages: Lineages) -> None:
        self.plan, self.ledger, self.rules, self.lineages = plan, ledger, rules, lineages
        self.groups: dict[GroupId, Held | None] = {}  # None: in flight
        self.leases: dict[int, Taken] = {}
        self.orphans: list[tuple[GroupId, ...]] = []  # to be leased again
        self.attempts: Counter[GroupId] = Counter()  # deaths of actors that had the group
        self.outcomes: deque[bool] = deque(maxlen=rules.window)
        self.rounds_taken = 0
        self.next_position = self.next_lease = 0
        self.last_failure = ""

    def lease(
        self, actor: int, slot: int, done: int | None, version: Version, weights: object,
        committed: int, step: int,
    ) -> Lease | None:  # fmt: skip
        """The next prompts, to be generated under this version; None while none is admitted.

        done: the last lease that this slot has handed in. What else it holds in the books is a
        lease whose answer was lost on the way, and it gets that again. None: not to be looked at.
        """
        lost = self._in_hand(actor, slot, done) if done is not None else None
        if lost is not None and not self._admits(lost.lease.groups[-1], version, committed, step):
            self.orphans.append(self.leases.pop(lost.lease.id).lease.groups)  # a roll-back since
            lost = None
        if lost is not None:
            lease = replace(lost.lease, version=version, weights=weights)
        else:
            groups = self._orphaned(version, committed, step)
            groups = groups or self._issue(version, committed, step)
            if not groups:
                return None
            lease = Lease(self.next_lease, groups, version, weights)
            self.next_lease += 1
        self.leases[lease.id] = Taken(lease, actor, slot, time.monotonic())
        return lease

    def _in_hand(self, actor: int, slot: int, done: int) -> Taken | None:
        for taken in self.leases.values():
            if (taken.actor, taken.slot) == (actor, slot) and taken.lease.id != done:
                return taken
        return None

    def _orphaned(self, version: Version, committed: int, step: int) -> tuple[GroupId, ...]:
        """The first groups that are to be leased again, if their round may start now."""
        self.orphans = [out for groups in self.orphans if (out := self.still_out(groups))]
        if not self.orphans:
            return ()
        first = min(self.orphans)
        if not self._admits(first[-1], version, committed, step):
            return ()
        self.orphans.remove(first)
        return first

    def _admits(self, group: GroupId, version: Version, committed: int, step: int) -> bool:
        """Whether a group of the line may be made by this version now."""
        return self.plan.admits(self._round(group), committed, step, version.step)

    def _round(self, group: GroupId) -> int:
        """The round that will take a group of the line."""
        ahead = list(self.groups).index(group) if group in self.groups else 0
        return self.rounds_taken + ahead // self.plan.groups_per_round

    def still_out(self, groups: tuple[GroupId, ...]) -> tuple[GroupId, ...]:
        """Those of the groups that are in flight."""
        return tuple(group for group in groups if self.groups.get(group, group) is None)

    def _issue(self, version: Version, committed: int, step: int) -> tuple[GroupId, ...]:
        """New prompts for the first round that still lacks some, if it may start now."""
        per_round = self.plan.groups_per_round
        live = self.rounds_taken * per_round + len(self.groups)
        round_ = live // per_round
        if not self.plan.admits(round_, committed, step, version.step):
            return ()
        count = min(self.plan.lease, per_round - live % per_round)
        groups = tuple(GroupId(self.next_position + i, 0) for i in range(count))
        self.next_position += count
        self.groups.update(dict.fromkeys(groups))
        self.ledger.issue(count * self.plan.members)
        return groups

    def put(self, lease: Lease, block: Rollouts, committed: int, step: int) -> None:
        """Take a lease's groups, all members terminal; those that are known already are ignored.

        After a roll-back, those come again that undone weights made, or weights that are by now too
        old for the round that will take them.
        """
        self.leases.pop(lease.id, None)
        undone = []
        oldest_N = block.oldest_step_N()
        for place, group in enumerate(block.ids()):
            self.attempts.pop(group, None)
            if group in self.groups and self.groups[group] is None:
                self._enter(group, block, place, oldest_N)
                if self._is_undone(group, committed, step):
                    undone.append(group)
        self.come_again(undone)

    def _enter(
        self, group: GroupId, block: Rollouts, place: int, oldest_N: np.ndarray
    ) -> None:  # fmt: skip
        rows = slice(place * block.members, (place + 1) * block.members)
        status = block.status_N[rows].tolist()
        failed = [STATUS_NAMES[code] for code in status if code != VALID]
        self.outcomes.extend(code == VALID for code in status)
        for reason in failed:
            self.ledger.retire_in_flight(reason, 1)
        if failed:
            self.last_failure = next(
                why for r, why in block.failures.items() if rows.start <= r < rows.stop
            )
        valid = len(status) - len(failed)
        if valid < self.rules.min_valid:
            self.ledger.retire_in_flight("group_incomplete", valid)
            del self.groups[group]
            return
        self.ledger.enter(valid)
        self.groups[group] = Held.of(block, place, oldest_N)

    def _is_undone(self, group: GroupId, committed: int, step: int) -> bool:
        held = self.groups.get(group)
        if held is None or not self.lineages.last_step or held.oldest == OFFLINE_STEP:
            return False
        if self.lineages.undone(held):
            return True
        last = self.rounds_taken + len(self.groups) // self.plan.groups_per_round
        if self.plan.last_age(last, committed, step, held.oldest) <= self.plan.max_age:
            return False  # so it is within its budget wherever in the line it stands
        age = self.plan.last_age(self._round(group), committed, step, held.oldest)
        return age > self.plan.max_age

    def come_again(self, groups: list[GroupId]) -> None:
        """Retire waiting groups as rolled back; each keeps its place as its next incarnation.

        They are leased again together, as they were: with one lease's shape come its very draws.
        """
        if not groups:
            return
        again = {group: GroupId(group.position, group.incarnation + 1) for group in groups}
        for group in groups:
            held = self.groups[group]
            assert held is not None
            self.ledger.retire_queued("rolled_back", held.valid)
        self.groups = {
            again.get(group, group): None if group in again else held
            for group, held in self.groups.items()
        }
        self.ledger.issue(len(again) * self.plan.members)
        self.orphans.append(tuple(again.values()))

    def release(self, actor: int | None, blame: bool = True) -> tuple[int, list[int]]:
        """Leases of a dead actor (None: of all) are to be issued again, under the same ids.

        blame: count it against their prompts. One whose actors died `attempts` times is
        quarantined; before that, a lease is taken apart to find it. Returns how many leases, and
        the positions quarantined.
        """
        dead = [id_ for id_, taken in self.leases.items() if actor in (None, taken.actor)]
        quarantined: list[int] = []
        for groups in [self.leases.pop(id_).lease.groups for id_ in dead]:
            if blame:
                self.attempts.update(groups)
            worst = max(self.attempts[group] for group in groups)
            if len(groups) == 1 and worst >= self.rules.attempts:
                quarantined += self._quarantine(groups[0])
            elif worst >= self.rules.attempts - 1:
                self.orphans.extend((group,) for group in groups)
            else:
                self.orphans.append(groups)
        return len(dead), quarantined

    def _quarantine(self, group: GroupId) -> list[int]:
        if self.groups.get(group, group) is not None:
            return []  # it came in before its actor died
        del self.groups[group]
        self.ledger.retire_in_flight("quarantined", self.plan.members)
        return [group.position]

    def check_failures(self) -> None:
        """Raise TooManyFailures when the last rollouts failed more often than allowed."""
        seen = len(self.outcomes)
        failed = seen - sum(self.outcomes)
        if seen == self.outcomes.maxlen and failed > self.rules.failure_rate * seen:
            raise TooManyFailures(
                f"{failed} of the last {seen} rollouts failed, over limits.failure_rate="
                f"{self.rules.failure_rate}; the last one: {self.last_failure}"
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
                self.lineages.keep(group, held)
                del self.groups[group]

    def missing(self) -> str:
        """What the next round waits for, in words."""
        now = time.monotonic()
        held = [
            f"positions {t.lease.groups[0].position}–{t.lease.groups[-1].position} with actor "
            f"{t.actor} for {now - t.since:.0f} s"
            for t in self.leases.values()
        ]
        if self.orphans:
            held.append(f"{len(self.orphans)} leases of dead actors, not yet taken up again")
        ready = sum(group is not None for group in self.groups.values())
        where = "; ".join(held) or "no prompt is leased: every actor is starting, or gone"
        return f"{ready} of {self.plan.groups_per_round} groups of its round; {where}"
