"""Weights that the learner pushes into a vLLM engine: the actor's side of `learner.vllm_push`.

The learner calls the steps of vLLM's own protocol on every actor at once: `init` for each epoch of
its transfer group, then `start`, `update` (once or several times) and `finish` for each version.
Nothing is generated in between. An update that fails, or that the learner never finishes, leaves
the engine paused and without a version, so that whatever it serves next waits for weights through
shared memory (`VllmEngine.load`). A version is never claimed before all of its weights are there.
"""

import asyncio
import contextlib
from typing import Any, Protocol

from actors.engine import NO_VERSION
from actors.rollout import Version


class PushedEngine(Protocol):
    """What a push needs of `actors.vllm_engine.VllmEngine`."""

    version: Version
    updating: asyncio.Lock  # held while weights change
    halted: bool  # paused until weights come through shared memory
    asleep: bool

    @property
    def llm(self) -> Any:
        """vLLM's AsyncLLM."""


class Pushes:
    """The steps, as coroutines on the engine's loop. `seconds`: the longest from start to end."""

    def __init__(self, engine: PushedEngine, seconds: float) -> None:
        self.engine = engine
        self.seconds = seconds
        self._open = False
        self._count = 0  # pushes started, so that a late failure ends its own only
        self._alarm: asyncio.TimerHandle | None = None

    async def step(self, name: str, payload: dict[str, Any]) -> None:
        """One of init, start, update, finish and abandon, with what the learner sent for it."""
        if name not in ("init", "start", "abandon") and not self._open:
            raise RuntimeError(f"{name} of a push that has been abandoned or never started")
        count = self._count + (name == "start")
        try:
            await getattr(self, f"_{name}")(payload)
        except BaseException:
            if count == self._count:
                await self._abandon({})
            raise

    async def _init(self, payload: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._abandon({})  # an epoch ends with whatever was under way in it
        async with self.engine.updating:
            info = {"push": payload, "seconds": self.seconds}
            await self.engine.llm.init_weight_transfer_engine(WeightTransferInitRequest(info))

    async def _start(self, payload: dict[str, Any]) -> None:
        await self._abandon({})
        await self.engine.updating.acquire()
        self._open, self._count = True, self._count + 1
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(self.seconds, lambda: loop.create_task(self._abandon({})))
        if self.engine.asleep:  # and paused; its KV cache stays away until the next lease
            await self.engine.llm.wake_up(tags=["weights"])
        else:
            await self.engine.llm.pause_generation(mode="keep", clear_cache=True)
        await self.engine.llm.start_weight_update()

    async def _update(self, payload: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.engine.llm.update_weights(WeightTransferUpdateRequest(payload))

    async def _finish(self, payload: dict[str, Any]) -> None:
        version = Version(*payload["version"])
        await self.engine.llm.finish_weight_update(label(version))
        self.engine.version = version
        self.engine.halted = False
        self._close()
        if not self.engine.asleep:
            await self.engine.llm.resume_generation()

    async def _abandon(self, payload: dict[str, Any]) -> None:
        """End a push without its version; the engine stays paused."""
        if not self._open:
            return
        self._open = False  # a second one is not needed
        self.engine.version, self.engine.halted = NO_VERSION, True
        with contextlib.suppress(Exception):  # vLLM has ended an update that failed by itself
            await asyncio.wait_for(self.engine.llm.finish_weight_update(), self.seconds)
        self._close()

    def _close(self) -> None:
        self._open = False
        if self._alarm is not None:
            self._alarm.cancel()
        self.engine.updating.release()


def label(version: Version) -> str:
    """A version as vLLM's record of weights has it."""
    return f"{version.lineage}.{version.step}"
