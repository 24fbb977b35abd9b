"""What the queue's process keeps on disk, and how it comes back from there.

The base of `learner.replay.service.QueueService`: the queue and its journal, the checkpoints' cuts,
the way back to one, and waiting, which all of its calls do alike.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import faults
from learner.replay import recovery, snapshot
from learner.replay.journal import Journal, read_base, write_base
from learner.replay.queue import ReplayQueue
from learner.replay.rollback import roll_back
from learner.replay.settings import Settings
from learner.replay.stalls import Stalls

STATE = "queue.base"  # the queue's part of a checkpoint


class Cuts:
    """A queue that its journal outlives."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False
        self.journal = Journal(Path(settings.journal)) if settings.journal else None
        found = recovery.recover(self._new, self.journal) if self.journal else None
        self.queue = found or self._new()
        self.queue.lineages.kept = None
        self.stalls = Stalls()
        self._wants_weights = found is not None
        self.queue.weights.clear()
        self._due: dict[int, list[Any]] = {}  # by batch: weights that its last report publishes
        self._cuts: dict[int, str] = {}  # by batch: the checkpoint that it ends
        self._written: dict[str, asyncio.Task[None]] = {}
        self._waiters: set[asyncio.Event] = set()
        if self.journal:
            self._segment("restart" if found else "start")()

    def _new(self) -> ReplayQueue:
        return ReplayQueue(self.settings.plan, self.settings.ranks, self.settings.rules)

    @property
    def _stall_seconds(self) -> float:
        return self.settings.stall_seconds

    def _cut(self, folder: str) -> None:
        """Begin a segment here; its base, once written, is the checkpoint's part as well."""
        write = self._segment("cut", Path(folder) / STATE)
        self._written[folder] = asyncio.ensure_future(asyncio.to_thread(write))

    def _segment(self, kind: str, target: Path | None = None) -> Callable[[], None]:
        """Begin a segment of the journal; what is returned writes its base."""
        assert self.journal is not None
        path = self.journal.begin()
        batch, state = self.queue.committed, snapshot.take(self.queue)
        for operation in recovery.pending(self.queue):
            self._note(operation)

        def write() -> None:
            if target is None:
                write_base(path, batch, kind, state)
                return
            faults.hit("queue.write.before")
            write_base(path, batch, kind, state)
            _same_file(path, target)
            faults.hit("queue.write.after")

        return write

    async def cut(self, number: int, folder: str) -> None:
        """Make this very moment, with so many batches committed, a checkpoint's cut."""
        if await self._until(lambda: self.queue.committed >= number, self._stall_seconds):
            self._cut(folder)

    async def written(self, number: int, folder: str) -> None:
        """Wait for the queue's part of a checkpoint; OSError where the disk refused it.

        number: batches committed at its cut. LookupError where the queue restarted meanwhile.
        """
        past = await self._until(lambda: self.queue.committed >= number, self._stall_seconds)
        if not past or folder not in self._written:
            raise LookupError(f"the queue restarted before it came to the cut of {folder}")
        await self._written.pop(folder)

    async def covered(self, batch: int) -> None:
        """Checkpoints older than this batch are gone, and nothing will be undone past it."""
        if self.journal:
            self.journal.prune(batch)

    async def roll_back(self, folder: str, actors_died: bool) -> tuple[int, int]:
        """Back to a checkpoint, under a new lineage; returns that, and the batch to go on with.

        folder: the checkpoint's; empty: back to the very beginning.
        actors_died: no actor of before lives, so that all leases are to be issued again.
        """
        assert self.journal is not None
        batch, state = 0, snapshot.take(self._new())
        if folder:
            batch, _, state = read_base(Path(folder) / STATE)
        live = self.queue
        queue = recovery.recover(self._new, self.journal, batch)
        if queue is None:
            queue = recovery.restored(self._new, state)
        lineage = max(live.version.lineage, queue.version.lineage) + 1
        roll_back(queue, state, lineage)
        recovery.account_for_lost(queue, live)
        if actors_died:
            queue.release(None, blame=False)
        queue.lineages.kept = None
        self.queue, self._wants_weights, self.closed = queue, False, False
        self._due, self._cuts = {}, {}
        self._segment("roll_back")()
        self.stalls.progress()
        self._wake()
        return lineage, queue.committed

    def _note(self, operation: dict[str, Any]) -> None:
        if self.journal:
            self.journal.append(operation)
        if operation["do"] != "freeze":
            self.stalls.progress()

    def _wake(self) -> None:
        for event in self._waiters:
            event.set()

    async def _until(self, condition: Callable[[], Any], seconds: float) -> Any:
        """The condition's first true value, looked at after every change; None after `seconds`."""
        if value := condition():
            return value
        deadline = time.monotonic() + seconds
        event = asyncio.Event()
        self._waiters.add(event)
        try:
            while not (value := condition()):
                event.clear()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                try:
                    await asyncio.wait_for(event.wait(), remaining)
                except TimeoutError:
                    return None
            return value
        finally:
            self._waiters.discard(event)


def _same_file(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
