"""When a run is checkpointed, and the checkpoints that are being written while it goes on."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from cluster.checkpoints import Checkpoints
from cluster.parts import Parts
from cluster.restarts import reason
from configs.schema import Config

MIB = 2**20


@dataclass
class _Pending:
    """A checkpoint under way: its parts' calls, then the thread that finishes it."""

    batch: int
    step: int
    part: Path
    driver: dict[str, Any]
    queue: Any  # the call that comes back when its part is written
    ranks: list[Any]  # calls that say whether theirs are
    since: float = field(default_factory=time.monotonic)
    finishing: Future[Path] | None = None


class Saver:
    """Asks for checkpoints and finishes them. A failed one is named, and the run goes on.

    say: takes a line for people. complete_driver: (step, the driver's state at the cut) → that
    state with what came later of the steps up to it, or None while something of them is awaited.
    """

    def __init__(
        self, config: Config, checkpoints: Checkpoints, parts: Parts, say: Callable[[str], None],
        complete_driver: Callable[[int, dict[str, Any]], dict[str, Any] | None],
    ) -> None:  # fmt: skip
        self.config, self.checkpoints, self.parts, self.say = config, checkpoints, parts, say
        self.complete_driver = complete_driver
        self.on = config.checkpoints
        self.written = 0
        self._promised = ""  # the folder that a call to the ranks will fill
        self._pending: _Pending | None = None
        self._last, self._last_batch = time.monotonic(), 0
        self._forced = False

    def folder_for(self, batch: int) -> str:
        """The folder of a checkpoint that ends with this many batches; empty where none is due."""
        settings = self.config.checkpoint
        if not self.on or self._promised or self._pending is not None:
            return ""
        by_step = settings.every and batch - self._last_batch >= settings.every
        by_time = settings.seconds and time.monotonic() - self._last >= settings.seconds
        if by_step or by_time or self._forced:
            self._promised = self._folder(batch)
        return self._promised

    def _folder(self, batch: int) -> str:
        try:
            return str(self.checkpoints.begin(batch).resolve())
        except OSError as error:
            self._failed(batch, f"{error.strerror}: {error.filename}")
            return ""

    def force(self) -> None:
        """Make one with the next batches."""
        self._forced = True

    def look_at_journal(self, status: dict[str, Any]) -> None:
        """A long or broken journal makes the next checkpoint come early."""
        if status["journal_bytes"] > self.config.checkpoint.journal_mib * MIB:
            self.force()
        if status["journal_broken"] and not self._forced:
            self.say(status["journal_broken"] + ": what is made until the next checkpoint is lost "
                     "if the queue dies")  # fmt: skip
            self.force()

    def took(self, folder: str, batch: int, step: int, driver: dict[str, Any]) -> None:
        """The cut is made, after `batch` batches: what is left is to wait for the writing."""
        if not folder:
            return
        self._promised = ""
        queue, ranks = self.parts.queue_written(batch, folder), self.parts.ranks_written()
        self._pending = _Pending(batch, step, Path(folder), driver, queue, ranks)
        self._forced = False
        self._last, self._last_batch = time.monotonic(), batch

    def now(self, batch: int, step: int, driver: dict[str, Any]) -> None:
        """Make one of this very moment, between batches; the writing goes on."""
        if not self.on or not (folder := self._folder(batch)):
            return
        self.parts.save(batch, folder)
        self.took(folder, batch, step, driver)

    def poll(self) -> None:
        """Go on with the one under way, as far as that needs no waiting."""
        pending = self._pending
        if pending is None:
            return
        try:
            if pending.finishing is None:
                self._finish_when_written(pending)
            elif pending.finishing.done():
                pending.finishing.result()
                self._pending = None
                self.written += 1
                self.parts.covered(self.checkpoints.prune())
            if time.monotonic() - pending.since > self.config.limits.step_seconds:
                raise TimeoutError(f"not written in {self.config.limits.step_seconds:g} s")
        except Exception as error:
            self._pending = None
            shutil.rmtree(pending.part, ignore_errors=True)
            self._failed(pending.batch, reason(error))

    def _finish_when_written(self, pending: _Pending) -> None:
        calls = [pending.queue, *pending.ranks]
        done, late = ray.wait(calls, num_returns=len(calls), timeout=0.0)
        answers = ray.get(done)  # raises what kept a part from being written
        if late:
            return
        if False in answers:
            pending.ranks = self.parts.ranks_written()
            return
        driver = self.complete_driver(pending.step, pending.driver)
        if driver is not None:
            pending.finishing = _in_thread(lambda: self.checkpoints.complete(pending.part, driver))

    def _failed(self, batch: int, why: str) -> None:
        self._last, self._forced = time.monotonic(), False
        self.say(f"no checkpoint at batch {batch}: {why}")

    def wait(self, seconds: float) -> None:
        """Until nothing is under way."""
        deadline = time.monotonic() + seconds
        while self._pending is not None and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.02)

    def start_over(self, batch: int) -> None:
        """Forget what is under way, for what it is of died; the run goes on from `batch`."""
        if self._pending is not None:
            if self._pending.finishing is not None:
                self.wait(self.config.limits.wait_seconds)
            else:
                shutil.rmtree(self._pending.part, ignore_errors=True)
        self._pending, self._promised, self._forced = None, "", False
        self._last, self._last_batch = time.monotonic(), batch


def _in_thread(work: Callable[[], Path]) -> "Future[Path]":
    """What the work returns or raises. The thread does not keep the process from ending."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
