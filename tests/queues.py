"""Queues of small plans, and groups made by hand to put into them."""

import itertools

import numpy as np

from actors.actor import Lease
from actors.rollout import UNLABELLED, VALID, Rollouts, Version, offsets
from learner.replay.line import Rules
from learner.replay.queue import ReplayQueue
from learner.replay.staleness import Plan, plan
from tests.harness import settings

LENGTH = 3


def queue_of(*overrides: str, ranks: int = 1, min_valid: int = 1, window: int = 10**6):
    config = settings("bandit_best_of_n", *overrides)
    queue = ReplayQueue(plan(config), ranks, Rules(min_valid, 0.5, window))
    queue.publish(Version(0, 0), ["w0"])
    return queue


def small(passes: int = 1, round_groups: int = 2, batch_groups: int = 1, **changes) -> Plan:
    fields = dict(
        seed=0, members=2, groups_per_round=round_groups, groups_per_batch=batch_groups,
        passes=passes, batches=100, lease=1, lockstep=True, offline=False, max_age=100, lag=0,
        ready_order=False, shuffle=False,
    )  # fmt: skip
    return Plan(**(fields | changes))


def small_queue(ranks: int = 1, min_valid: int = 1, window: int = 1000, **changes) -> ReplayQueue:
    queue = ReplayQueue(small(**changes), ranks, Rules(min_valid, 0.5, window))
    queue.publish(Version(0, 0), ["w0"])
    return queue


def answer(lease: Lease, members: int, failures: dict[int, int] | None = None) -> Rollouts:
    """What an actor would put: rewards by position and member, chosen members failed."""
    groups, n = len(lease.groups), len(lease.groups) * members
    position = np.array([g.position for g in lease.groups])
    block = Rollouts(
        members=members,
        position_G=position,
        incarnation_G=np.array([g.incarnation for g in lease.groups], dtype=np.int32),
        row_G=position % 4,
        prompt_offset_G1=offsets([1] * groups),
        prompt_P=np.zeros(groups, dtype=np.int32),
        offset_N1=offsets([LENGTH] * n),
        token_K=np.arange(n * LENGTH, dtype=np.int32),
        logp_K=np.full(n * LENGTH, -1.0, dtype=np.float32),
        lineage_K=np.full(n * LENGTH, lease.version.lineage, dtype=np.int16),
        step_K=np.full(n * LENGTH, lease.version.step, dtype=np.int32),
        reward_N=(np.repeat(position, members) * 10 + np.tile(np.arange(members), groups)).astype(
            np.float32
        ),
        status_N=np.full(n, VALID, dtype=np.uint8),
        truncated_N=np.zeros(n, dtype=bool),
        label_N=np.full(n, UNLABELLED, dtype=np.int8),
        scorer_N=np.zeros(n, dtype=np.uint8),
    )
    for rollout, status in (failures or {}).items():
        block.fail(rollout, status, "it broke")
    return block


def fill(queue: ReplayQueue, failures: dict[int, int] | None = None) -> int:
    """Serve every lease that is admitted; returns how many there were."""
    for count in itertools.count():
        lease = queue.lease(0)
        if lease is None:
            return count
        queue.put(lease, answer(lease, queue.plan.members, failures))
        failures = None
    raise AssertionError


def consume(queue: ReplayQueue, stepped: bool = True):
    batch = queue.get(queue.version.lineage, queue.committed, 0)
    assert batch is not None, queue.missing(queue.committed)
    queue.commit(batch.lineage, batch.number, 0, stepped)
    queue.publish(queue.version, [f"w{queue.version.step}"])
    return batch
