"""Every rollout of a lease is counted once, whoever dies, fails or answers twice."""

import numpy as np
import pytest

from actors.actor import Lease
from actors.rollout import GENERATION_FAILED, REWARD_FAILED, Version
from learner.replay.line import Rules, TooManyFailures
from learner.replay.queue import ReplayQueue
from tests.queues import answer, consume, fill, small, small_queue


def test_a_put_is_idempotent():
    queue = small_queue()
    lease = queue.lease(0)
    queue.put(lease, answer(lease, 2))
    queue.put(lease, answer(lease, 2))
    assert queue.ledger.counts()["queued"] == 2


def test_a_dead_actors_lease_is_issued_again_under_the_same_ids():
    queue = small_queue()
    lost = queue.lease(0)
    assert queue.release(0) == (1, [])
    again = queue.lease(1)
    assert again.groups == lost.groups and again.id != lost.id
    assert queue.ledger.issued == 2
    queue.put(again, answer(again, 2))
    queue.put(lost, answer(lost, 2))  # the dead actor's put arrives late
    assert queue.ledger.counts()["queued"] == 2


def test_failed_members_retire_with_their_reason_and_are_masked():
    queue = small_queue(round_groups=1)
    fill(queue, {1: REWARD_FAILED})
    batch = consume(queue)
    assert batch.index.valid_M.tolist() == [True, False]
    assert batch.round_rewards.tolist() == [0.0]
    retired = queue.ledger.counts()["retired"]
    assert (retired["reward_failed"], retired["exhausted"]) == (1, 1)


def test_a_group_below_min_valid_is_replaced_by_the_next_prompt():
    queue = small_queue(round_groups=2, min_valid=2)
    assert fill(queue, {0: GENERATION_FAILED}) == 3
    retired = queue.ledger.counts()["retired"]
    assert (retired["generation_failed"], retired["group_incomplete"]) == (1, 1)
    assert [g.position for g in consume(queue).block.ids()] == [1]
    assert [g.position for g in consume(queue).block.ids()] == [2]


def test_too_many_failures_stop_the_run_and_say_why():
    queue = small_queue(window=4)
    for _ in range(2):
        lease = queue.lease(0)
        queue.put(lease, answer(lease, 2, {0: REWARD_FAILED, 1: REWARD_FAILED}))
    with pytest.raises(TooManyFailures, match="4 of the last 4 rollouts failed.*it broke"):
        queue.check_failures()


def test_a_prompt_whose_actors_keep_dying_is_found_and_quarantined():
    queue = ReplayQueue(small(lease=4, round_groups=4, batch_groups=4), 1, Rules(1, 0.9, 1000, 3))
    queue.publish(Version(0, 0), ["w0"])
    deaths, quarantined = 0, []
    while not quarantined:
        lease = queue.lease(0)
        if any(group.position == 2 for group in lease.groups):
            deaths += 1
            quarantined = queue.release(0)[1]
        else:
            queue.put(lease, answer(lease, 2))
    assert (deaths, quarantined) == (3, [2])
    assert queue.ledger.retired["quarantined"] == 2
    for lease in iter(lambda: queue.lease(0), None):
        queue.put(lease, answer(lease, 2))
    assert [group.position for group in queue.line.groups] == [0, 1, 3, 4]
    assert queue.ledger.balanced


def test_the_ledger_balances_whatever_happens():
    rng = np.random.default_rng(0)
    queue = small_queue(round_groups=3, passes=2, lockstep=False, max_age=20, min_valid=2)
    leases: list[Lease] = []
    for _ in range(2000):
        action = rng.integers(4)
        if action == 0 and (lease := queue.lease(int(rng.integers(3)))):
            leases.append(lease)
        elif action == 1 and leases:
            lease = leases.pop(int(rng.integers(len(leases))))
            failures = {0: REWARD_FAILED} if rng.random() < 0.2 else None
            queue.put(lease, answer(lease, 2, failures))
        elif action == 2 and rng.random() < 0.1:
            queue.release(int(rng.integers(3)))
        elif not queue.finished and queue.get(0, queue.committed, 0):
            queue.commit(0, queue.committed, 0, bool(rng.random() < 0.9))
            queue.publish(queue.version, ["w"])
        assert queue.ledger.balanced
    assert queue.committed > 30 and queue.ledger.retired["expired"] == 0
