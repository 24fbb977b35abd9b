"""The arithmetic of Algorithm 1: which batch consumes what, and what may be started when.

Round r (B rollouts) feeds the S = T·B/M batches r·S … r·S + S − 1. Counted so, a group started for
round r on weights of step v is consumed for the last time by batch r·S + S − 1; it may be started
only if that is within `max_age` (law 6), so a run never expires a sample by bad pacing.
"""

from dataclasses import dataclass

import numpy as np

from actors.randomness import stream_key, uniforms
from configs.choices import DataSource, Order, Schedule
from configs.schema import Config


@dataclass(frozen=True)
class Plan:
    """Sizes in groups, ages in optimizer steps, batches numbered from 0 over the whole run."""

    seed: int
    members: int  # C
    groups_per_round: int  # B/C
    groups_per_batch: int  # M/C
    passes: int  # T
    batches: int  # learner.updates
    lease: int
    lockstep: bool
    offline: bool
    max_age: int
    lag: int
    ready_order: bool
    shuffle: bool

    @property
    def batches_per_pass(self) -> int:
        """B/M."""
        return self.groups_per_round // self.groups_per_batch

    @property
    def batches_per_round(self) -> int:
        """S."""
        return self.passes * self.batches_per_pass

    @property
    def rounds(self) -> int:
        return -(-self.batches // self.batches_per_round)

    def last_batch(self, round_: int) -> int:
        """The last batch that consumes this round."""
        return round_ * self.batches_per_round + self.batches_per_round - 1

    def last_age(self, round_: int, committed: int, step: int, version_step: int) -> int:
        """The age at its last consumption of a group of this round, made at `version_step`.

        committed: batches done; step: optimizer steps made of them (fewer, where some skipped).
        """
        return self.last_batch(round_) - committed + step - version_step

    def admits(self, round_: int, committed: int, step: int, version_step: int) -> bool:
        """Whether generation for this round may start now on weights of `version_step`."""
        if round_ >= self.rounds:
            return False
        if self.lockstep:
            return committed >= round_ * self.batches_per_round
        return self.last_age(round_, committed, step, version_step) <= self.max_age

    @property
    def most_open(self) -> int:
        """The most groups that admission lets be leased or queued at once, no step skipped.

        Batch c of a round leaves room for (max_age − lag + 1 + c mod S)/S rounds, the one in hand
        included; before the first step, when no version is late yet, for (max_age + 1)/S.
        """
        if self.lockstep or self.offline:
            return self.groups_per_round
        size = self.batches_per_round
        rounds = max((self.max_age - self.lag) // size + 1, (self.max_age + 1) // size)
        return min(rounds, self.rounds) * self.groups_per_round

    def consumed_by(self, batch: int) -> tuple[int, list[int]]:
        """Round of a batch, and the places of its groups within the round, in order."""
        round_, index = divmod(batch, self.batches_per_round)
        pass_, part = divmod(index, self.batches_per_pass)
        order = np.arange(self.groups_per_round)
        if self.shuffle:
            key = stream_key(self.seed, "replay.shuffle")
            order = np.argsort(uniforms(key, round_, pass_, order), kind="stable")
        start = part * self.groups_per_batch
        return round_, order[start : start + self.groups_per_batch].tolist()


def plan(config: Config) -> Plan:
    """The plan that a resolved and checked configuration asks for."""
    replay = config.replay
    return Plan(
        seed=config.seed,
        members=config.rollout.responses_per_prompt,
        groups_per_round=config.groups_per_round,
        groups_per_batch=config.groups_per_step,
        passes=replay.inner_epochs,
        batches=config.learner.updates,
        lease=min(config.rollout.lease, config.groups_per_round),
        lockstep=replay.schedule is Schedule.lockstep,
        offline=config.data.source is DataSource.offline,
        max_age=replay.max_age if replay.max_age is not None else 0,
        lag=replay.lag,
        ready_order=replay.order is Order.ready,
        shuffle=replay.shuffle,
    )
