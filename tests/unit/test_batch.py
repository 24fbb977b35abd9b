"""Padded batches: what is read off their columns."""

import numpy as np

from learner.batch import distinct


def test_distinct_pairs_are_those_of_two_rows_also_below_zero():
    generator = np.random.default_rng(0)
    first_N = generator.integers(-1, 3, 200).astype(np.int32)
    second_N = generator.choice([-1, 0, 7, 2**31 - 1, -(2**31)], 200)
    expected, owner = np.unique(np.stack([first_N, second_N]), axis=1, return_inverse=True)
    pairs_P2, owner_N = distinct(first_N, second_N)
    np.testing.assert_array_equal(pairs_P2, expected.T)
    np.testing.assert_array_equal(owner_N, owner.reshape(-1))
    none_P2, _ = distinct(first_N[:0], second_N[:0])
    assert none_P2.shape == (0, 2)
