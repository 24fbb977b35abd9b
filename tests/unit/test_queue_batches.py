"""A step is a transaction: its batch is the same at every call, and counts once and in turn."""

import numpy as np
import pytest

from actors.actor import Lease
from actors.rollout import GENERATION_FAILED, REWARD_FAILED, Version, concatenate
from learner.replay.line import QueueError
from tests.queues import LENGTH, answer, consume, fill, queue_of, small_queue


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
