"""The buffer that weights go through: what the reader sees of what has been written."""

import numpy as np
import pytest

from actors import shared_memory
from actors.shared_memory import FILLED, WeightBuffer, attach


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_a_reader_sees_all_that_the_mark_says(count, monkeypatch):
    monkeypatch.setattr(shared_memory, "PIECE", 8)
    buffer = WeightBuffer(count)
    array, mark = attach(buffer.path, count)
    buffer.unlink()
    assert mark[FILLED] == count and not array.any()  # zeros to begin with
    seen: list[int] = []

    class Weights(np.ndarray):
        """Says at each piece how much the reader may take."""

        def __getitem__(self, key: slice) -> np.ndarray:
            seen.append(int(mark[FILLED]))
            assert (array[: mark[FILLED]] == np.arange(1, mark[FILLED] + 1)).all()
            return np.asarray(self).view(np.ndarray)[key]

    mark[FILLED] = 0
    buffer.fill(np.arange(1, count + 1, dtype=np.float32).view(Weights))
    assert seen == list(range(0, count, 8)) and mark[FILLED] == count
    np.testing.assert_array_equal(array, np.arange(1, count + 1))
