"""Blocks of rollouts: their way between processes, and the age that their tokens say."""

import copy
import pickle

import numpy as np
import pytest

from actors import rollout
from actors.rollout import OFFLINE_STEP, REWARD_FAILED, offsets
from benchmarks.queue_payload import block_of, columns


def out_of_band(block):
    buffers = []
    data = pickle.dumps(block, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=buffers), len(buffers)


@pytest.mark.parametrize("tokens", [0, 5, 256, 8192])
def test_a_block_arrives_as_it_was_sent_and_a_small_one_as_a_single_buffer(tokens):
    block = block_of(2, tokens)
    block.scored(np.array([1]), np.array([0.5]), "a scorer")
    block.fail(3, REWARD_FAILED, "it broke")
    block.derived["standardised_N"] = np.arange(16.0)
    for sent in (block, block.select(1, 2)):
        found, buffers = out_of_band(sent)
        arrays = columns(sent)
        assert set(arrays) == set(columns(found)) == set(rollout._ARRAYS)
        for name, column in arrays.items():
            got = getattr(found, name)
            assert got.dtype == column.dtype and got.flags.aligned
            np.testing.assert_array_equal(got, column)
        np.testing.assert_array_equal(
            found.derived["standardised_N"], sent.derived["standardised_N"]
        )
        assert found.failures == sent.failures and found.scorers == sent.scorers
        assert buffers == (2 if sent.nbytes <= rollout._ONE_BUFFER else 16)  # one is derived


def test_a_copy_of_a_block_can_be_written_to():
    block = block_of(1, 4)
    for other in (copy.copy(block), copy.deepcopy(block)):
        other.reward_N[0] = 7.0


def test_the_oldest_step_is_of_the_rollouts_own_tokens_and_empty_ones_have_none():
    block = block_of(1, 0)
    lengths = [0, 3, 0, 0, 2, 1, 0, 0]
    block.offset_N1 = offsets(lengths)
    block.step_K = np.array([5, 3, 9, 1, 8, 4], dtype=np.int32)
    none = OFFLINE_STEP
    assert block.oldest_step_N().tolist() == [none, 3, none, none, 1, 4, none, none]
