"""Items by position of a source that memory does not hold, over and over without end."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")
Order = Callable[[int, int, int], np.ndarray]  # of a buffer: epoch, number, items → permutation


class Buffered(Generic[Item]):
    """Position p is item p mod n of epoch p // n, where n, the items of the source, is known once
    its end was seen.

    source: iterated anew for each reading. It is read on as positions are asked for, `size` items
    at a time, and the last two such buffers are kept: positions may come out of order by as much.
    One further back, or one of the next epoch, begins a new reading. order: of the items within a
    buffer; None: the source's.
    """

    def __init__(self, source: Iterable[Item], size: int, order: Order | None = None) -> None:
        self._source, self._size, self._order = source, size, order
        self._items: int | None = None
        self._begin()

    @property
    def items(self) -> int:
        """n; reads to the end where that was not seen yet."""
        while self._items is None:
            self._read_on()
        return self._items

    @property
    def empty(self) -> bool:
        """Whether the source has no items at all."""
        return not self._buffer(0)

    def __getitem__(self, position: int) -> tuple[int, Item]:
        """Number in the source and item at a position, 0 or more."""
        if position < 0:
            raise IndexError(f"position {position} is below 0")
        epoch, size = 0, self._size
        while self._items is None and position >= self._next * size:
            self._read_on()
        if self._items is not None:
            epoch, position = divmod(position, self._items)
        number, place = divmod(position, size)
        items = self._buffer(number)
        if self._order is not None:
            place = int(self._order(epoch, number, len(items))[place])
        return number * size + place, items[place]

    def _buffer(self, number: int) -> list[Item]:
        """The items number·size … of an epoch; empty beyond its end."""
        if number < self._next and number not in self.kept:
            self._begin()
        while self._next <= number and not self._ended:
            self._read_on()
        return self.kept.get(number, [])

    def _begin(self) -> None:
        self._reading: Iterator[Item] = iter(self._source)
        self.kept: dict[int, list[Item]] = {}  # by number
        self._next, self._ended = 0, False  # buffer

    def _read_on(self) -> None:
        """Read the next buffer, and forget all but the last."""
        items = list(itertools.islice(self._reading, self._size))
        self._ended = len(items) < self._size
        self.kept = {self._next - 1: self.kept.get(self._next - 1, []), self._next: items}
        self._next += 1
        if self._ended:
            self._items = (self._next - 1) * self._size + len(items)
