"""The queue's laws, on groups made by hand: conservation, budget, transactions, idempotence."""

import itertools

import numpy as np
import pytest

from actors.actor import Lease
from actors.rollout import (
    GENERATION_FAILED,
    REWARD_FAILED,
    UNLABELLED,
    VALID,
    Rollouts,
    Version,
    concatenate,
    offsets,
)
from learner.replay.line import QueueError, Rules, TooManyFailures
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


def test_lockstep_ages_are_exactly_zero_to_S_minus_1_and_reuse_ends_at_T():
    queue = queue_of(
        "replay.samples_per_round=400", "learner.minibatch=100", "replay.inner_epochs=2",
        "learner.updates=24",
    )  # fmt: skip
    assert queue.plan.batches_per_round == 8
    for _ in range(24):
        fill(queue)
        consume(queue)
    assert set(queue.ledger.age) == set(range(8))
    assert dict(queue.ledger.reuse) == {1: 1200, 2: 1200}
    assert queue.ledger.counts()["retired"]["exhausted"] == queue.ledger.issued == 1200
    assert queue.ledger.retired["expired"] == 0


def test_lockstep_issues_a_round_only_after_the_one_before_is_consumed():
    queue = small_queue(passes=2)
    assert fill(queue) == 2
    for _ in range(3):
        consume(queue)
        assert fill(queue) == 0
    consume(queue)
    assert fill(queue) == 2


def test_with_lag_k_every_first_use_is_at_age_k_from_step_k_on():
    queue = small_queue(round_groups=1, lag=3, max_age=3)
    ages = []
    for _ in range(10):
        fill(queue)
        ages.append(int(consume(queue).index.age_M[0]))
    assert ages == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("max_age", [0, 1, 4, 16])
def test_pipelined_generation_runs_ahead_as_far_as_the_budget_and_nothing_expires(max_age):
    queue = small_queue(round_groups=1, lockstep=False, max_age=max_age)
    assert fill(queue) == max_age + 1
    for _ in range(60):
        fill(queue)
        assert int(consume(queue).index.age_M.max()) <= max_age
    assert max(queue.ledger.age) == max_age
    assert queue.ledger.retired["expired"] == 0


def test_pipelining_overlaps_rounds_of_many_steps_from_2S_minus_1_on():
    tight = small_queue(passes=2, lockstep=False, max_age=2 * 4 - 2)
    wide = small_queue(passes=2, lockstep=False, max_age=2 * 4 - 1)
    assert (fill(tight), fill(wide)) == (2, 4)


def test_get_freezes_a_batch_and_gives_the_same_at_every_call():
    queue = small_queue(ranks=2, batch_groups=2)
    fill(queue)
    first = [queue.get(0, 0, rank) for rank in (0, 1)]
    again = [queue.get(0, 0, rank) for rank in (0, 1)]
    for one, other in zip(first, again):
        assert one.block.ids() == other.block.ids()
        assert np.array_equal(one.index.reward_M, other.index.reward_M)
    assert [b.block.groups for b in first] == [1, 1]
    assert [b.first for b in first] == [0, 2]


def test_a_batch_counts_once_all_ranks_have_reported_and_only_once():
    queue = small_queue(ranks=2, batch_groups=2)
    fill(queue)
    queue.get(0, 0, 0), queue.get(0, 0, 1)
    assert queue.commit(0, 0, 0, True) is False
    assert queue.committed == 0 and queue.get(0, 1, 0) is None
    assert queue.commit(0, 0, 1, True) is True
    assert queue.commit(0, 0, 1, True) is True
    assert (queue.committed, queue.version) == (1, Version(0, 1))
    assert sum(queue.ledger.reuse.values()) == 4


def test_ranks_that_disagree_on_stepping_are_refused():
    queue = small_queue(ranks=2, batch_groups=2)
    fill(queue)
    queue.get(0, 0, 0)
    queue.commit(0, 0, 0, True)
    with pytest.raises(QueueError, match="disagree"):
        queue.commit(0, 0, 1, False)


def test_a_stale_lineage_is_refused():
    queue = small_queue()
    fill(queue)
    with pytest.raises(QueueError, match="lineage 7"):
        queue.get(7, 0, 0)
    queue.get(0, 0, 0)
    with pytest.raises(QueueError, match="lineage 7"):
        queue.commit(7, 0, 0, True)


def test_a_skipped_step_uses_up_its_batch_and_makes_no_version():
    queue = small_queue(round_groups=1)
    fill(queue)
    consume(queue, stepped=False)
    assert (queue.committed, queue.version.step) == (1, 0)
    assert queue.ledger.retired["exhausted"] == 2
    fill(queue)
    assert int(consume(queue).index.age_M[0]) == 0


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


def test_consumption_is_in_issue_order_and_waits_for_a_straggler():
    queue = small_queue(round_groups=1, lockstep=False, max_age=5)
    slow, fast = queue.lease(0), queue.lease(1)
    queue.put(fast, answer(fast, 2))
    assert queue.get(0, 0, 0) is None
    assert "positions 0–0 with actor 0" in queue.missing(0)
    queue.put(slow, answer(slow, 2))
    assert queue.get(0, 0, 0).block.ids()[0].position == 0


def test_ready_order_takes_what_is_there_and_counts_stragglers_that_expire():
    queue = small_queue(round_groups=1, lockstep=False, max_age=1, ready_order=True)
    slow, fast = queue.lease(0), queue.lease(1)
    queue.put(fast, answer(fast, 2))
    assert consume(queue).block.ids()[0].position == 1
    other = queue.lease(1)
    queue.put(other, answer(other, 2))
    assert consume(queue).block.ids()[0].position == 2
    queue.put(slow, answer(slow, 2))  # made at step 0, now step 2
    assert queue.get(0, 2, 0) is None
    assert queue.ledger.retired["expired"] == 2
    fill(queue)
    assert int(consume(queue).index.age_M.max()) <= 1
    assert queue.ledger.balanced


def test_the_guard_at_consumption_retires_what_is_over_the_budget():
    queue = small_queue(round_groups=2, max_age=0)  # no plan can keep this; the guard must
    fill(queue)
    consume(queue)
    batch = queue.get(0, 1, 0)
    assert batch.block is None and len(batch.index.reward_M) == 0
    assert queue.ledger.retired["expired"] == 2


def test_derived_columns_come_back_at_the_next_pass_and_only_if_committed():
    queue = small_queue(passes=2, round_groups=1)
    fill(queue)
    batch = queue.get(0, 0, 0)
    column = np.arange(2 * LENGTH, dtype=np.float32)
    queue.commit(0, 0, 0, True, {"reference_logp_K": column, "value_N": column[:2]})
    assert batch.block.derived == {}
    derived = queue.get(0, 1, 0).block.derived
    assert np.array_equal(derived["reference_logp_K"], column)
    assert np.array_equal(derived["value_N"], column[:2])


def test_shuffled_passes_hold_each_group_once_and_are_keyed():
    orders = []
    for _ in range(2):
        queue = small_queue(passes=2, round_groups=8, shuffle=True)
        fill(queue)
        orders.append([consume(queue).block.ids()[0].position for _ in range(16)])
    assert orders[0] == orders[1]
    assert sorted(orders[0][:8]) == sorted(orders[0][8:]) == list(range(8))
    assert orders[0][:8] != orders[0][8:] and orders[0][:8] != list(range(8))


def test_offline_reuse_accumulates_on_the_data_sets_row_and_has_no_age():
    queue = small_queue(round_groups=4, passes=2, offline=True)
    for _ in range(16):
        for _ in range(fill(queue)):
            pass
        consume(queue)
    assert set(queue.ledger.reuse) == {1, 2, 3, 4}
    assert not queue.ledger.age


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


def test_blocks_select_and_concatenate_to_themselves():
    lease = Lease(0, tuple(queue_of().lease(0).groups), Version(0, 0))
    block = answer(lease, 10, {3: REWARD_FAILED, 17: GENERATION_FAILED})
    parts = [block.select(i, i + 1) for i in range(block.groups)]
    whole = concatenate(parts)
    assert np.array_equal(whole.token_K, block.token_K)
    assert np.array_equal(whole.offset_N1, block.offset_N1)
    assert whole.failures == block.failures and whole.ids() == block.ids()


def test_a_batch_fetched_ahead_is_tagged_as_if_the_one_in_hand_steps():
    queue = small_queue(passes=3, round_groups=1)
    fill(queue)
    queue.get(0, 0, 0)
    assert queue.get(0, 1, 0) is None  # the first pass derives columns that the second one wants
    queue.commit(0, 0, 0, True)
    queue.get(0, 1, 0)
    ahead = queue.get(0, 2, 0)
    assert (ahead.step, ahead.index.age_M[0], ahead.index.reuse_M[0]) == (2, 2, 3)
    queue.commit(0, 1, 0, True)
    queue.commit(0, 2, 0, True)
    assert dict(queue.ledger.age) == {0: 2, 1: 2, 2: 2}


def test_a_batch_fetched_ahead_is_thawed_when_the_one_in_hand_skips():
    queue = small_queue(passes=3, round_groups=1)
    fill(queue)
    queue.get(0, 0, 0)
    queue.commit(0, 0, 0, True)
    queue.get(0, 1, 0), queue.get(0, 2, 0)
    queue.commit(0, 1, 0, False)
    again = queue.get(0, 2, 0)
    assert (again.step, again.index.age_M[0], again.index.reuse_M[0]) == (1, 1, 3)


def test_no_batch_is_fetched_more_than_one_ahead_or_committed_out_of_turn():
    queue = small_queue(passes=1, round_groups=3)
    fill(queue)
    assert queue.get(0, 1, 0) is None  # nothing is in hand yet
    queue.get(0, 0, 0), queue.get(0, 1, 0)
    assert queue.get(0, 2, 0) is None
    with pytest.raises(QueueError, match="batch 0 is next"):
        queue.commit(0, 1, 0, True)
