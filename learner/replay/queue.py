"""The replay queue: an index of groups by state, one version counter, and the ledger.

Groups live through: leased (in flight) → waiting in the line → in a round → consumed T times →
retired. A round takes the first B/C groups of the line, in issue order or as they get ready, so a
group that fails leaves no hole: the next one moves up, and one more prompt is issued.

A step is a transaction (law 2): `get` freezes a batch's composition and tags at its first call,
every rank reports with `commit`, and the last report makes the batch count. One batch may be
fetched ahead of the one in hand, tagged as if that one steps; if it skips, the other is thawed and
frozen anew. Nothing in this file
waits or knows of Ray; `learner.replay.service` does.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.actor import Lease
from actors.rollout import (
    OFFLINE_STEP,
    STATUS_NAMES,
    VALID,
    GroupId,
    Rollouts,
    Version,
    concatenate,
)
from learner.replay.ledger import Ledger
from learner.replay.records import Batch, Held, Index, index
from learner.replay.staleness import Plan


class QueueError(RuntimeError):
    """The queue refuses, or cannot go on; the message says which and why."""


class TooManyFailures(QueueError):
    """More rollouts fail than `limits.failure_rate` allows."""


@dataclass
class _Open:
    """A frozen batch, and the ranks' reports on it."""

    number: int
    step: int
    round: int
    ids: list[GroupId]
    index: Index
    measures: dict[str, Any]
    reports: dict[int, tuple[bool, dict[str, np.ndarray]]] = field(default_factory=dict)


class ReplayQueue:
    """See the module's docstring. Methods either act at once or say that it is too early."""

    def __init__(
        self, plan: Plan, ranks: int, min_valid: int, failure_rate: float, failure_window: int,
        lineage: int = 0,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.ranks = ranks
        self.min_valid = min_valid
        self.failure_rate = failure_rate
        self.ledger = Ledger()
        self.version = Version(lineage, 0)
        self.committed = 0
        self.next_position = 0
        self.line: dict[GroupId, Held | None] = {}  # issued, in no round yet; None: in flight
        self.leases: dict[int, tuple[Lease, int, float]] = {}  # lease, actor, since
        self._next_lease = 0
        self._orphans: deque[Lease] = deque()
        self._rounds: dict[int, tuple[list[GroupId], np.ndarray]] = {}  # groups, valid rewards
        self._rounds_formed = 0
        self._held: dict[GroupId, Held] = {}  # in a round being consumed
        self._weights: dict[int, Any] = {}
        self._row_reuse: Counter[tuple[int, int]] = Counter()  # offline: (row, member) → reuse
        self._open: dict[int, _Open] = {}  # by number: the batch in hand, and one ahead of it
        self._outcomes: deque[bool] = deque(maxlen=failure_window)
        self.last_failure = ""

    # Actors: lease, put, release.

    @property
    def finished(self) -> bool:
        return self.committed >= self.plan.batches

    def lease(self, actor: int) -> Lease | None:
        """The next prompts and the version to make them under; None while none is admitted."""
        version, weights = self._version_for_actors()
        if version is None:
            return None
        groups = self._orphans.popleft().groups if self._orphans else self._issue(version)
        if not groups:
            return None
        lease = Lease(self._next_lease, groups, version, weights)
        self._next_lease += 1
        self.leases[lease.id] = (lease, actor, time.monotonic())
        return lease

    def newer(self, than: Version) -> Lease | None:
        """The version that actors may have now, as a lease of no prompts, if newer than theirs."""
        version, weights = self._version_for_actors()
        if version is None or weights is None or version <= than:
            return None
        return Lease(-1, (), version, weights)

    def _version_for_actors(self) -> tuple[Version | None, Any]:
        if self.plan.offline:
            return Version(self.version.lineage, OFFLINE_STEP), None
        due = max(0, self.version.step - self.plan.lag)
        ready = [step for step in self._weights if step <= due]
        if not ready:
            return None, None
        step = max(ready)
        if self.plan.lockstep and step != due and self.plan.lag == 0:
            return None, None  # the weights of this very step are on their way
        return Version(self.version.lineage, step), self._weights[step]

    def _issue(self, version: Version) -> tuple[GroupId, ...]:
        """New prompts for the first round that still lacks some, if it may start now."""
        per_round = self.plan.groups_per_round
        live = self._rounds_formed * per_round + len(self.line)
        round_ = live // per_round
        if not self.plan.admits(round_, self.committed, self.version.step, version.step):
            return ()
        count = min(self.plan.lease, per_round - live % per_round)
        groups = tuple(GroupId(self.next_position + i, 0) for i in range(count))
        self.next_position += count
        self.line.update(dict.fromkeys(groups))
        self.ledger.issue(count * self.plan.members)
        return groups

    def put(self, lease: Lease, block: Rollouts) -> None:
        """Take a lease's groups, all members terminal; those that are known already are ignored."""
        self.leases.pop(lease.id, None)
        for place, group in enumerate(block.ids()):
            if group in self.line and self.line[group] is None:
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
            del self.line[group]
            return
        self.ledger.enter(int(valid_C.sum()))
        oldest_C = block.select(place, place + 1).oldest_step_N()
        self.line[group] = Held(block, place, time.monotonic(), valid_C, oldest_C)

    def release(self, actor: int) -> int:
        """Leases of a dead actor are to be issued again, under the same ids; their number."""
        dead = [id_ for id_, (_, owner, _) in self.leases.items() if owner == actor]
        for id_ in dead:
            lease = self.leases.pop(id_)[0]
            self._orphans.append(lease)
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

    # Learner: publish, get, commit.

    def publish(self, version: Version, weights: Any) -> None:
        """Make a version's weights known. Versions that no actor can be given any more go."""
        if version.lineage != self.version.lineage:
            raise QueueError(f"weights of {version}, but the queue is at {self.version}")
        self._weights[version.step] = weights
        due = max(0, self.version.step - self.plan.lag)
        newest = max((s for s in self._weights if s <= due), default=-1)
        for step in [s for s in self._weights if s < newest]:
            del self._weights[step]

    def get(self, lineage: int, number: int, rank: int) -> Batch | None:
        """The rank's slice of a batch, the same at every call; None while rollouts are missing."""
        if lineage != self.version.lineage:
            raise QueueError(f"lineage {lineage} is over; the queue is at {self.version}")
        if number not in self._open:
            if not self.committed <= number < self.plan.batches:
                raise QueueError(f"batch {number} is not open: {self.committed} are committed")
            if not self._freeze(number):
                return None
        batch = self._open[number]
        each = -(-self.plan.groups_per_batch // self.ranks)
        mine = batch.ids[rank * each : (rank + 1) * each]
        parts = [self._held[group].columns() for group in mine]
        return Batch(
            lineage=lineage,
            number=number,
            step=batch.step,
            round=batch.round,
            first=rank * each * self.plan.members,
            block=concatenate(parts) if parts else None,
            index=batch.index,
            round_rewards=self._rounds[batch.round][1],
            measures=batch.measures,
            last=number + 1 == self.plan.batches,
        )

    def _freeze(self, number: int) -> bool:
        """Fix what the batch holds and how it is tagged; False while it is too early for that."""
        ahead = number - self.committed
        in_hand = self._open.get(self.committed)
        if ahead > 1 or (ahead == 1 and in_hand is None):
            return False
        round_, places = self.plan.consumed_by(number)
        if round_ not in self._rounds and not self._form(round_):
            return False
        ids = [self._rounds[round_][0][place] for place in places]
        before = set(in_hand.ids) if ahead and in_hand else set()
        if any(self._held[group].reuse == 0 for group in before.intersection(ids)):
            return False  # its first pass is under way, and will derive columns for this one
        step = self.version.step + ahead
        if ahead and any(self._old(group, step) for group in before.intersection(ids)):
            return False  # to be retired, but not out of the batch in hand
        ids = [group for group in ids if not self._expired(group, step)]
        held = [self._held[group] for group in ids]
        reuse = [self._reuse_C(h) + (g in before) + 1 for g, h in zip(ids, held)]
        now = time.monotonic()
        fresh = [now - h.entered for h in held if h.reuse == 0]
        measures = {
            "queue_seconds": float(np.mean(fresh)) if fresh else None,
            "queue_depth": self.ledger.queued,
            "rollouts_in_flight": self.ledger.in_flight,
            "retired_total": dict(self.ledger.retired),
        }
        tags = index(held, reuse, step, self.plan.offline)
        self._open[number] = _Open(number, step, round_, ids, tags, measures)
        return True

    def _form(self, round_: int) -> bool:
        """Take the round's groups off the line, if they are all there."""
        wanted = self.plan.groups_per_round
        if self.plan.ready_order:
            self._expire_stragglers(round_)
            ids = [group for group, held in self.line.items() if held is not None][:wanted]
        else:
            ids = [group for _, group in zip(range(wanted), self.line)]
        if len(ids) < wanted or any(self.line[group] is None for group in ids):
            return False
        rewards = []
        for group in ids:
            held = self.line.pop(group)
            assert held is not None
            self._held[group] = held
            rewards.append(held.rows("reward_N")[held.valid_C])
        self._rounds[round_] = (ids, np.concatenate(rewards))
        self._rounds_formed = round_ + 1
        return True

    def _expire_stragglers(self, round_: int) -> None:
        """Ready order only: drop groups whose last consumption in this round would be too old."""
        for group, held in list(self.line.items()):
            if held is None or held.oldest == OFFLINE_STEP:
                continue
            age = self.plan.last_age(round_, self.committed, self.version.step, held.oldest)
            if age > self.plan.max_age:
                self.ledger.retire_queued("expired", held.valid)
                del self.line[group]

    def _expired(self, group: GroupId, step: int) -> bool:
        """The guard at consumption: retire a group over `max_age`, and say so."""
        if group not in self._held:
            return True
        if not self._old(group, step):
            return False
        self.ledger.retire_queued("expired", self._held.pop(group).valid)
        return True

    def _old(self, group: GroupId, step: int) -> bool:
        held = self._held.get(group)
        if held is None or held.oldest == OFFLINE_STEP:
            return False
        return step - held.oldest > self.plan.max_age

    def _reuse_C(self, held: Held) -> np.ndarray:
        """Committed consumptions of each member; offline they add up on the data set's row."""
        if not self.plan.offline:
            return np.full(self.plan.members, held.reuse)
        row = int(held.block.row_G[held.place])
        return np.array([self._row_reuse[row, member] for member in range(self.plan.members)])

    def commit(
        self, lineage: int, number: int, rank: int, stepped: bool,
        derived: dict[str, np.ndarray] | None = None,
    ) -> bool:  # fmt: skip
        """A rank has stepped or skipped; True once all have, which makes the batch count.

        derived: the learner's columns over the rank's slice, named …_N or …_K.
        """
        if lineage != self.version.lineage:
            raise QueueError(f"lineage {lineage} is over; the queue is at {self.version}")
        if number < self.committed:
            return True  # said before; commits are idempotent
        if number != self.committed or number not in self._open:
            raise QueueError(f"batch {number} is not in hand; batch {self.committed} is next")
        batch = self._open[number]
        batch.reports[rank] = (stepped, derived or {})
        if len(batch.reports) < self.ranks:
            return False
        if len({report[0] for report in batch.reports.values()}) > 1:
            raise QueueError(f"ranks disagree on whether batch {number} stepped")
        self._close(batch, stepped)
        return True

    def _close(self, batch: _Open, stepped: bool) -> None:
        index = batch.index
        if not index.offline:
            self.ledger.age.update(index.age_M[index.valid_M].tolist())
        self.ledger.reuse.update(index.reuse_M[index.valid_M].tolist())
        self._write_back(batch)
        for group in batch.ids:
            held = self._held[group]
            held.reuse += 1
            if self.plan.offline:
                row = int(held.block.row_G[held.place])
                self._row_reuse.update((row, m) for m in np.flatnonzero(held.valid_C).tolist())
            if held.reuse == self.plan.passes:
                self.ledger.retire_queued("exhausted", held.valid)
                del self._held[group]
        del self._open[batch.number]
        if batch.number == self.plan.last_batch(batch.round):
            del self._rounds[batch.round]
        self.committed += 1
        if stepped:
            self.version = Version(self.version.lineage, self.version.step + 1)
        else:
            self._open.pop(self.committed, None)  # it was tagged as if this one had stepped

    def _write_back(self, batch: _Open) -> None:
        each = -(-self.plan.groups_per_batch // self.ranks)
        for rank, (_, derived) in batch.reports.items():
            for name, column in derived.items():
                start = 0
                for group in batch.ids[rank * each : (rank + 1) * each]:
                    held = self._held[group]
                    size = held.tokens if name.endswith("_K") else self.plan.members
                    held.derived[name] = column[start : start + size]
                    start += size

    def missing(self, number: int) -> str:
        """What a batch waits for, in words."""
        now = time.monotonic()
        held = [
            f"positions {lease.groups[0].position}–{lease.groups[-1].position} with actor {actor}"
            f" for {now - since:.0f} s"
            for lease, actor, since in self.leases.values()
        ]
        if self._orphans:
            held.append(f"{len(self._orphans)} leases of dead actors, not yet taken up again")
        ready = sum(held_ is not None for held_ in self.line.values())
        where = "; ".join(held) or "no prompt is leased: every actor is starting, or gone"
        return (
            f"batch {number} has {ready} of {self.plan.groups_per_round} groups of its round; "
            f"{where}"
        )
