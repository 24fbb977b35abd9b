"""metrics.jsonl as it grows: each call reads only the lines that were added since the last one."""

import itertools
import json
import math
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from cluster.report.tables import numbers
from cluster.report.tally import Tally

CHUNK = 200  # lines taken at a time
_NOT_A_LINE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)

Piece = tuple[np.ndarray, np.ndarray]  # numbers of lines, and what is there


class History:
    """Every number of a run's metrics lines by name, and `tally`, a summary of them.

    A number within an object has a dotted name, as `age.mean`; objects within that are left. A last
    line without its line end is still being written, and waits. A file that is not what it was, as
    of a run that went back to a checkpoint, is read from its beginning again, and `readings` goes
    up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.readings = 0
        self._file_id: tuple[int, int] | None = None
        self._begin(tallied=False)

    def _begin(self, tallied: bool) -> None:
        self.readings += 1
        self.lines = 0
        self.unreadable = 0
        self.tally = Tally() if tallied else None
        self._offset = 0
        self._before = b""  # the last line read: it tells whether the file still begins as it did
        self._steps = array("d")
        self._pieces: dict[str, list[Piece]] = {}  # as they were read

    @property
    def state(self) -> tuple[int, int]:
        """Changes whenever what there is to show does."""
        return self.readings, self._offset

    def refresh(self, tallied: bool = True, seconds: float = math.inf) -> bool:
        """Read on, for so many seconds at most; whether that was all. A missing file is empty.

        tallied: whether `tally` is asked for; a third of the time is its. What was read without it
        is then read again.
        """
        if tallied and self.tally is None:
            self._begin(tallied)
        try:
            file = self.path.open("rb")
        except OSError:
            if self._offset:
                self._begin(tallied)
            return True
        with file:
            if self._rewritten(file):
                self._begin(tallied)
            file.seek(self._offset)
            whole = itertools.takewhile(lambda line: line.endswith(b"\n"), file)
            until = time.monotonic() + seconds
            while lines := list(itertools.islice(whole, CHUNK)):
                self._offset += sum(map(len, lines))
                self._before = lines[-1]
                self._take(lines)
                if time.monotonic() > until:
                    return False
        return True

    def _rewritten(self, file: BinaryIO) -> bool:
        now = os.fstat(file.fileno())
        identity, self._file_id = self._file_id, (now.st_dev, now.st_ino)
        if identity not in (None, self._file_id) or now.st_size < self._offset:
            return self._offset > 0
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) != self._before

    def _take(self, texts: list[bytes]) -> None:
        lines: list[dict[str, Any]] = []
        for text in texts:
            try:
                line = _decoded(text)
                step = float(line["step"])
                if self.tally:
                    self.tally.add(line)
            except _NOT_A_LINE:
                self.unreadable += bool(text.strip())
            else:
                lines.append(line)
                self._steps.append(step)
        for name, piece in _columns(lines, range(self.lines, self.lines + len(lines))):
            self._pieces.setdefault(name, []).append(piece)
        self.lines += len(lines)

    def names(self) -> list[str]:
        """What there is a curve of."""
        return list(self._pieces)

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a number, in the file's order; without those that are not finite.

        The same numbers as in the file: JSON's and ours are both 64 bits wide.
        """
        pieces = self._pieces.get(name)
        if pieces is None:
            return np.empty(0), np.empty(0)
        at, values = (np.concatenate(column) for column in zip(*pieces))
        order = at.argsort(kind="stable")
        at, values = at[order], values[order]
        self._pieces[name] = [(at, values)]
        steps = np.array(self._steps)[at]
        known = np.isfinite(steps) & np.isfinite(values)
        return steps[known], values[known]


def _columns(
    lines: Sequence[dict[str, Any]], at: Sequence[int] | np.ndarray, inner: bool = False
) -> Iterator[tuple[str, Piece]]:
    """The numbers of each name, and the lines they are of; lines of one shape are taken together,
    which is quick. inner: these are objects within lines, and none within them is looked at."""
    shapes: dict[tuple[str, ...], list[int]] = {}
    for i, line in enumerate(lines):
        shapes.setdefault(tuple(line), []).append(i)
    for shape, which in shapes.items():
        rows = np.array([at[i] for i in which])
        for name, values in zip(shape, zip(*(lines[i].values() for i in which))):
            kinds = set(map(type, values))
            if kinds <= {float, int}:
                yield name, (rows, numbers(values))
            elif dict in kinds and not inner:
                there = [i for i, value in enumerate(values) if type(value) is dict]
                objects = [values[i] for i in there]
                for key, piece in _columns(objects, rows[there], inner=True):
                    yield f"{name}.{key}", piece


def _decoded(text: bytes) -> Any:
    """msgspec is the quicker, and refuses what json lets be: NaN."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)
