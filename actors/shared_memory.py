"""Weights through shared memory: one buffer that the sender fills and the reader maps.

Behind the weights are two marks, numbers that both processes see at once: how many weights have
been written (FILLED), and how many versions the reader has made ready (STAGED).

The file has a name only until every reader has opened it, so that nothing is left behind whichever
process dies; and its pages stay mapped, so that each later version costs one copy into warm memory.
"""

import contextlib
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path("/dev/shm")
FILLED, STAGED = 0, 1  # places of the marks
MARK_BYTES = 16
PIECE = 2**20  # numbers written before the mark says so
UNSTAGED = -1  # mark of a reader that takes weights only while it does nothing else


class WeightBuffer:
    """A float32 array in shared memory, [count], mapped by this process and by those who `attach`.

    Raises ValueError in one line where shared memory has no room for it.
    """

    def __init__(self, count: int) -> None:
        folder = FOLDER if FOLDER.is_dir() else Path(tempfile.gettempdir())
        nbytes = _mark_at(count) + MARK_BYTES
        descriptor, self.path = tempfile.mkstemp(prefix="onpolicy-weights-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # else a full tmpfs shows as SIGBUS later
            self._map = mmap.mmap(descriptor, nbytes)
        except OSError as error:
            self.unlink()
            free = shutil.disk_usage(folder).free
            raise ValueError(
                f"{nbytes / 1e6:,.0f} MB of weights do not fit into {folder} "
                f"({free / 1e6:,.0f} MB free): give it more room, e.g. --shm-size in a container"
            ) from error
        finally:
            os.close(descriptor)
        self.array, self.mark = _cut(self._map, count)
        self.mark[FILLED] = count  # zeros

    def fill(self, weights: np.ndarray) -> None:
        """Write all weights, [count]; a reader that follows FILLED may take them as they come.
        FILLED has to be 0 before that reader is told."""
        for start in range(0, len(weights), PIECE):
            self.array[start : start + PIECE] = weights[start : start + PIECE]
            self.mark[FILLED] = min(start + PIECE, len(weights))

    def unlink(self) -> None:
        """Take the name away; the memory lives until its last mapping ends."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def attach(path: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Array [count] and marks [2] of another process's `WeightBuffer`, views of the same memory."""
    with open(path, "r+b") as file:
        return _cut(mmap.mmap(file.fileno(), 0), count)


def _mark_at(count: int) -> int:
    """Bytes before the marks: the weights, and what aligns them."""
    return -(-4 * count // MARK_BYTES) * MARK_BYTES


def _cut(memory: mmap.mmap, count: int) -> tuple[np.ndarray, np.ndarray]:
    array = np.frombuffer(memory, dtype=np.float32, count=count)
    return array, np.frombuffer(memory, dtype=np.int64, count=2, offset=_mark_at(count))
