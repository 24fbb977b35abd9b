"""The replay queue: an index of groups by state, one version counter, and the ledger.

Groups live through: leased (in flight) → waiting in the line → in a round → consumed T times →
retired. The line (`learner.replay.line`) is the actors' side; this is the learner's.

A step is a transaction (law 2): `get` freezes a batch's composition and tags at its first call,
every rank reports with `commit`, and the last report makes the batch count. One batch may be
fetched ahead of the one in hand, tagged as if that one steps; if it skips, the other is thawed and
frozen anew. Nothing here waits or knows of Ray; `learner.replay.service` does.
"""

import time
from collections import Counter
from typing import Any

import numpy as np

from actors.actor import Lease
from actors.rollout import OFFLINE_STEP, GroupId, Join, Rollouts, Version
from learner.replay.ledger import Ledger
from learner.replay.line import Line, QueueError, Rules
from learner.replay.lineage import Lineages
from learner.replay.records import Batch, Held, Open, columns, index
from learner.replay.staleness import Plan


class ReplayQueue:
    """See the module's docstring. Methods either act at once or say that it is too early."""

    def __init__(self, plan: Plan, ranks: int, rules: Rules) -> None:
        self.plan = plan
        self.ranks = ranks
        self.ledger = Ledger()
        self.lineages = Lineages()
        self.line = Line(plan, self.ledger, rules, self.lineages)
        self.version = Version(0, 0)
        self.committed = 0
        self.rounds: dict[int, tuple[list[GroupId], np.ndarray]] = {}  # groups, valid rewards
        self.held: dict[GroupId, Held] = {}  # in a round being consumed
        self.weights: dict[int, Any] = {}  # by step
        self.row_reuse: Counter[tuple[int, int]] = Counter()  # offline: (row, member) → reuse
        self._probed: float | None = None  # the most nats/token since a batch was frozen
        self._open: dict[int, Open] = {}  # by number: the batch in hand, and one ahead of it

    # Actors: lease, put, release.

    @property
    def finished(self) -> bool:
        return self.committed >= self.plan.batches

    def lease(self, actor: int, slot: int = 0, done: int | None = None) -> Lease | None:
        """The next prompts and the version to make them under; None while none is admitted.

        slot, done: see `Line.lease`.
        """
        version, weights = self._version_for_actors()
        if version is None:
            return None
        step = self.version.step
        return self.line.lease(actor, slot, done, version, weights, self.committed, step)

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
        ready = [step for step in self.weights if step <= due]
        if not ready:
            return None, None
        step = max(ready)
        if self.plan.lockstep and step != due and self.plan.lag == 0:
            return None, None  # the weights of this very step are on their way
        return Version(self.version.lineage, step), self.weights[step]

    def put(self, lease: Lease, block: Rollouts) -> None:
        """Take a lease's groups, all members terminal; those that are known already are ignored."""
        self.line.put(lease, block, self.committed, self.version.step)

    def probed(self, nats: float | None) -> None:
        """How far an engine's scores of the probe text were from the learner's, if it was asked."""
        if nats is not None:
            self._probed = nats if self._probed is None else max(nats, self._probed)

    def release(self, actor: int | None, blame: bool = True) -> tuple[int, list[int]]:
        """Leases of a dead actor are to be issued again, see `Line.release`."""
        return self.line.release(actor, blame)

    def check_failures(self) -> None:
        """Raise TooManyFailures when the last rollouts failed more often than allowed."""
        self.line.check_failures()

    # Learner: publish, get, commit.

    def publish(self, version: Version, weights: Any) -> None:
        """Make a version's weights known. Versions that no actor can be given any more go."""
        if version.lineage != self.version.lineage:
            raise QueueError(f"weights of {version}, but the queue is at {self.version}")
        self.weights[version.step] = weights
        due = max(0, self.version.step - self.plan.lag)
        newest = max((s for s in self.weights if s <= due), default=-1)
        for step in [s for s in self.weights if s < newest]:
            del self.weights[step]

    def get(
        self, lineage: int, number: int, rank: int, join: Join = np.concatenate
    ) -> Batch | None:  # fmt: skip
        """The rank's slice of a batch, the same at every call; None while rollouts are missing.

        join: see `concatenate`.
        """
        self._refuse_stale(lineage)
        in_hand = self._open.get(self.committed)
        if number > self.committed and in_hand is not None and in_hand.skipped:
            return None  # what is frozen ahead of a skip is tagged wrongly, and about to thaw
        if not self.is_open(number) and not self.freeze(number):
            return None
        batch = self._open[number]
        each = -(-self.plan.groups_per_batch // self.ranks)
        mine = batch.ids[rank * each : (rank + 1) * each]
        return Batch(
            lineage=lineage,
            number=number,
            step=batch.step,
            round=batch.round,
            first=rank * each * self.plan.members,
            block=columns([self.held[group] for group in mine], join),
            index=batch.index,
            round_rewards=self.rounds[batch.round][1],
            measures=batch.measures,
            last=number + 1 == self.plan.batches,
        )

    def _refuse_stale(self, lineage: int) -> None:
        if lineage != self.version.lineage:
            raise QueueError(f"lineage {lineage} is over; the queue is at {self.version}")

    def is_open(self, number: int) -> bool:
        """Whether the batch is frozen."""
        return number in self._open

    def pending(self) -> list[tuple[int, dict[int, tuple[bool, dict[str, np.ndarray]]]]]:
        """Batches that are frozen and not committed, in order, and what ranks said of them."""
        return [(number, self._open[number].reports) for number in sorted(self._open)]

    def forget_open(self) -> None:
        """Thaw what is frozen, without a word of it."""
        self._open.clear()

    def freeze(self, number: int) -> bool:
        """Fix what the batch holds and how it is tagged; False while it is too early for that."""
        if not self.committed <= number < self.plan.batches:
            raise QueueError(f"batch {number} is not open: {self.committed} are committed")
        ahead = number - self.committed
        in_hand = self._open.get(self.committed)
        if ahead > 1 or (ahead == 1 and in_hand is None):
            return False
        round_, places = self.plan.consumed_by(number)
        if round_ not in self.rounds and not self._form(round_):
            return False
        ids = [self.rounds[round_][0][place] for place in places]
        before = set(in_hand.ids) if ahead and in_hand else set()
        if any(self.held[group].reuse == 0 for group in before.intersection(ids)):
            return False  # its first pass is under way, and will derive columns for this one
        step = self.version.step + ahead
        if ahead and any(self._old(group, step) for group in before.intersection(ids)):
            return False  # to be retired, but not out of the batch in hand
        ids = [group for group in ids if not self._expired(group, step)]
        held = [self.held[group] for group in ids]
        reuse = [self._reuse_C(h) + (g in before) + 1 for g, h in zip(ids, held)]
        now = time.monotonic()
        fresh = [now - h.entered for h in held if h.reuse == 0]
        measures = {
            "queue_seconds": float(np.mean(fresh)) if fresh else None,
            "queue_depth": self.ledger.queued,
            "rollouts_in_flight": self.ledger.in_flight,
            "retired_total": dict(self.ledger.retired),
            "engine_mismatch_probe": self._probed,
        }
        self._probed = None
        tags = index(held, reuse, step, self.plan.offline)
        self._open[number] = Open(number, step, round_, ids, tags, measures)
        return True

    def _form(self, round_: int) -> bool:
        """Take the round's groups off the line, if they are all there."""
        taken = self.line.take(round_, self.committed, self.version.step)
        if taken is None:
            return False
        self.held.update(taken)
        rewards = [held.rows("reward_N")[held.valid_C] for held in taken.values()]
        self.rounds[round_] = (list(taken), np.concatenate(rewards))
        return True

    def _expired(self, group: GroupId, step: int) -> bool:
        """The guard at consumption: retire a group over `max_age`, and say so."""
        if group not in self.held:
            return True
        if not self._old(group, step):
            return False
        held = self.held.pop(group)
        self.ledger.retire_queued("expired", held.valid)
        self.lineages.keep(group, held)
        return True

    def _old(self, group: GroupId, step: int) -> bool:
        held = self.held.get(group)
        if held is None or held.oldest == OFFLINE_STEP:
            return False
        return step - held.oldest > self.plan.max_age

    def _reuse_C(self, held: Held) -> np.ndarray:
        """Committed consumptions of each member; offline they add up on the data set's row."""
        if not self.plan.offline:
            return np.full(self.plan.members, held.reuse)
        row = int(held.block.row_G[held.place])
        return np.array([self.row_reuse[row, member] for member in range(self.plan.members)])

    def commit(
        self, lineage: int, number: int, rank: int, stepped: bool,
        derived: dict[str, np.ndarray] | None = None,
    ) -> bool:  # fmt: skip
        """A rank has stepped or skipped; True once all have, which makes the batch count.

        A rank may be one batch ahead of another. derived: the learner's columns over the rank's
        slice, named …_N or …_K.
        """
        self._refuse_stale(lineage)
        if number < self.committed:
            return True  # said before; commits are idempotent
        in_hand = self._open.get(self.committed)
        out_of_turn = number > self.committed and in_hand and rank not in in_hand.reports
        if number not in self._open or out_of_turn:
            raise QueueError(f"batch {number} is not in hand; batch {self.committed} is next")
        self._open[number].reports[rank] = (stepped, derived or {})
        while (batch := self._open.get(self.committed)) and len(batch.reports) == self.ranks:
            if batch.skipped and any(stepped for stepped, _ in batch.reports.values()):
                raise QueueError(f"ranks disagree on whether batch {batch.number} stepped")
            self._close(batch, not batch.skipped)
        return number < self.committed

    def _close(self, batch: Open, stepped: bool) -> None:
        index = batch.index
        if not index.offline:
            self.ledger.age.update(index.age_M[index.valid_M].tolist())
        self.ledger.reuse.update(index.reuse_M[index.valid_M].tolist())
        self._write_back(batch)
        for group in batch.ids:
            held = self.held[group]
            held.reuse += 1
            if self.plan.offline:
                row = int(held.block.row_G[held.place])
                self.row_reuse.update((row, m) for m in np.flatnonzero(held.valid_C).tolist())
            if held.reuse == self.plan.passes:
                self.ledger.retire_queued("exhausted", held.valid)
                self.lineages.keep(group, held)
                del self.held[group]
        del self._open[batch.number]
        if batch.number == self.plan.last_batch(batch.round):
            del self.rounds[batch.round]
        self.committed += 1
        if stepped:
            self.version = Version(self.version.lineage, self.version.step + 1)
        else:
            ahead = self._open.pop(self.committed, None)  # tagged as if this one had stepped
            for unseen in (batch, ahead):  # a skipped batch has no metrics line, this one no more
                self.probed(unseen.measures["engine_mismatch_probe"] if unseen else None)

    def _write_back(self, batch: Open) -> None:
        each = -(-self.plan.groups_per_batch // self.ranks)
        for rank, (_, derived) in batch.reports.items():
            for name, column in derived.items():
                start = 0
                for group in batch.ids[rank * each : (rank + 1) * each]:
                    held = self.held[group]
                    size = held.tokens if name.endswith("_K") else self.plan.members
                    held.derived[name] = column[start : start + size]
                    start += size

    def missing(self, number: int) -> str:
        """What a batch waits for, in words."""
        return f"batch {number} has {self.line.missing()}"
