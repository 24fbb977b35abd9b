"""The queue's journal: its state now and then, and every operation since, in the run's directory.

A *segment* is two files: `N.base`, the whole state at a checkpoint's cut or after a roll-back, and
`N.log`, the operations that followed. A frame is its length, its CRC-32 and its bytes, so that a
write cut short, or a flipped bit, ends the reading there. Written without fsync: it outlives every
process of ours, not the machine.
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from actors.codec import DamagedError, decode, encode

_NUMBER = re.compile(r"[0-9]{6,}")
_HEAD = struct.Struct("<QI")  # bytes of the payload, their CRC-32


def write_frame(file: BinaryIO, tree: Any) -> int:
    """Append one frame; returns its bytes. OSError where the disk does not take it."""
    payload = encode(tree)
    file.write(_HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
    file.flush()
    return _HEAD.size + len(payload)


def frames(path: Path) -> Iterator[Any]:
    """The frames of a file, up to the first that is cut short or damaged."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, crc = _HEAD.unpack(head)
            if length > size - file.tell():
                return
            payload = file.read(length)
            if zlib.crc32(payload) != crc:
                return
            try:
                yield decode(payload)
            except DamagedError:
                return


def read_base(path: Path) -> tuple[int, str, dict[str, Any]]:
    """A base's batch, its kind, and the state. DamagedError where it is not whole."""
    batch, kind = read_head(path)
    for place, tree in enumerate(frames(path)):
        if place == 1 and isinstance(tree, dict):
            return batch, kind, tree
    raise DamagedError(f"{path}: holds no whole state of the queue")


def read_head(path: Path) -> tuple[int, str]:
    """Batches committed at the cut, and what it was for. DamagedError where they are not there."""
    head = next(frames(path), None)
    if isinstance(head, dict) and type(head.get("batch")) is int:  # True is none
        return head["batch"], str(head.get("kind"))
    raise DamagedError(f"{path}: is missing or damaged")


def write_base(path: Path, batch: int, kind: str, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        write_frame(file, {"batch": batch, "kind": kind})
        write_frame(file, state)
    os.replace(beside, path)


class Journal:
    """Segments of one run, written by the queue's process alone."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.bytes = 0  # of operations since the last base
        self.broken = ""  # why nothing more is written, until the next segment
        self._log: BinaryIO | None = None

    def numbers(self) -> list[int]:
        """Segments there are, in order; a number may lack its base or its log."""
        return sorted({int(p.stem) for p in self.folder.iterdir() if _NUMBER.fullmatch(p.stem)})

    def base(self, number: int) -> Path:
        return self.folder / f"{number:06d}.base"

    def log(self, number: int) -> Path:
        return self.folder / f"{number:06d}.log"

    def begin(self) -> Path:
        """Start the next segment's log; returns where its base is to be written."""
        self.close()
        number = max(self.numbers(), default=0) + 1
        self.bytes, self.broken = 0, ""
        try:
            self._log = self.log(number).open("xb")
        except OSError as error:
            self._give_up(error)
        return self.base(number)

    def append(self, operation: dict[str, Any]) -> None:
        """Write an operation down. A disk that refuses ends the segment, not the run."""
        if self._log is None or self.broken:
            return
        try:
            self.bytes += write_frame(self._log, operation)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.broken = f"the queue's journal cannot be written: {error.strerror or error}"

    def operations(self, number: int) -> Iterator[Any]:
        """What a segment's log holds."""
        return frames(self.log(number))

    def prune(self, batch: int) -> None:
        """Remove segments that no recovery to this batch, or a later one, reads."""
        numbers = self.numbers()
        first = max((n for n in numbers if self._batch(n) == batch), default=0)
        for number in [n for n in numbers if n < first]:
            self.base(number).unlink(missing_ok=True)
            self.log(number).unlink(missing_ok=True)

    def _batch(self, number: int) -> int | None:
        try:
            return read_head(self.base(number))[0]
        except DamagedError:
            return None

    def close(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk, which was said before
                self._log.close()
            self._log = None
