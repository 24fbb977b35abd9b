"""Groups are issued and consumed in the order that is planned, none older than its budget."""

import pytest

from tests.queues import answer, consume, fill, queue_of, small_queue


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
