"""The actor's side of a push: no version before all its weights, no token from half of them."""

import asyncio
from typing import Any

import pytest

from actors.actor import Lease, RolloutActor
from actors.engine import NO_VERSION, Request
from actors.rollout import GroupId, Version
from actors.turns import TurnTaking
from actors.vllm_push import Pushes

pytest.importorskip("vllm")

SECONDS = 0.2


class FakeLlm:
    """vLLM's calls in the order they came; `breaks` names one that raises, `hangs` a slow one."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.breaks = self.hangs = ""

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> None:
            self.calls.append((name, *map(str, arguments)) if arguments else name)
            if name == self.hangs:
                await asyncio.sleep(60.0)
            if name == self.breaks:
                raise RuntimeError(f"{name} broke")

        return call


class FakeEngine:
    def __init__(self) -> None:
        self.version = Version(0, 1)
        self.updating = asyncio.Lock()
        self.halted = self.asleep = False
        self.llm = FakeLlm()
        self.pushes = Pushes(self, SECONDS)

    async def push(self, *steps: tuple[str, dict]) -> None:
        for name, payload in steps:
            await self.pushes.step(name, payload)


START, UPDATE = ("start", {}), ("update", {"push": {"names": []}})
FINISH = ("finish", {"version": (0, 2)})


def test_a_push_pauses_loads_labels_and_resumes_and_the_version_counts_from_then_on():
    async def run() -> None:
        engine = FakeEngine()
        await engine.push(START, UPDATE)
        assert engine.version == Version(0, 1) and engine.updating.locked()
        await engine.push(FINISH)
        assert engine.version == Version(0, 2) and not engine.updating.locked()
        names = [c if isinstance(c, str) else c[0] for c in engine.llm.calls]
        assert names == [
            "pause_generation", "start_weight_update", "update_weights", "finish_weight_update",
            "resume_generation",
        ]  # fmt: skip
        assert ("finish_weight_update", "0.2") in engine.llm.calls

    asyncio.run(run())


@pytest.mark.parametrize("broken", ["start_weight_update", "update_weights"])
def test_an_update_that_fails_leaves_no_version_and_generates_nothing(broken):
    async def run() -> None:
        engine = FakeEngine()
        engine.llm.breaks = broken
        with pytest.raises(RuntimeError, match=broken):
            await engine.push(START, UPDATE)
        assert engine.version == NO_VERSION and engine.halted and not engine.updating.locked()
        assert "resume_generation" not in engine.llm.calls
        assert not [c for c in engine.llm.calls if c[0] == "finish_weight_update"], "no label"
        with pytest.raises(RuntimeError, match="finish of a push that has been abandoned"):
            await engine.push(FINISH)
        engine.llm.breaks = ""
        await engine.push(START, UPDATE, FINISH)
        assert engine.version == Version(0, 2) and not engine.halted

    asyncio.run(run())


def test_a_learner_that_never_finishes_is_not_waited_for():
    async def run() -> None:
        engine = FakeEngine()
        await engine.push(START, UPDATE)
        await asyncio.sleep(2 * SECONDS)
        assert engine.version == NO_VERSION and engine.halted and not engine.updating.locked()

    asyncio.run(run())


def test_abandoning_does_not_wait_for_a_vllm_that_hangs():
    async def run() -> None:
        engine = FakeEngine()
        await engine.push(START)
        engine.llm.hangs = "finish_weight_update"
        await asyncio.wait_for(engine.pushes.step("abandon", {}), 4 * SECONDS)
        assert engine.version == NO_VERSION and not engine.updating.locked()
        await engine.pushes.step("abandon", {})  # twice does no harm

    asyncio.run(run())


def test_a_failure_that_comes_late_does_not_end_the_push_after_it():
    async def run() -> None:
        engine = FakeEngine()
        engine.llm.hangs = "update_weights"
        await engine.push(START)
        late = asyncio.create_task(engine.push(UPDATE))
        await asyncio.sleep(0.01)
        engine.llm.hangs = ""
        await engine.push(START)  # which ends the one before
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        await engine.push(UPDATE, FINISH)
        assert engine.version == Version(0, 2)

    asyncio.run(run())


def test_an_engine_that_sleeps_wakes_for_the_weights_only_and_stays_paused():
    async def run() -> None:
        engine = FakeEngine()
        engine.asleep = True
        await engine.push(START, UPDATE, FINISH)
        assert engine.llm.calls[0] == "wake_up" and engine.asleep
        assert {"resume_generation", "pause_generation"}.isdisjoint(engine.llm.calls)

    asyncio.run(run())


class Recorder:
    """Engine, queue and block of one actor, all in one log."""

    version = Version(-1, -1)
    reward_N = label_N = status_N = ()

    def __init__(self) -> None:
        self.log: list[str] = []
        self.leases = [Lease(n, (GroupId(n, 0),), Version(0, n), [None]) for n in (1, 2)]

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.log.append(name)

    def lease(self, actor: int) -> Lease | None:
        self.log.append("lease")
        return self.leases.pop(0) if self.leases else None

    def weights(self, lease: Lease) -> None: ...

    def generate(self, requests: list[Request], stream: str) -> "Recorder":
        self.log.append("generate")
        return self


def test_colocated_vllm_holds_gpu_memory_from_lease_to_put_only(monkeypatch):
    both = Recorder()
    monkeypatch.setattr("actors.actor.score", lambda *_: both.log.append("score"))
    RolloutActor(0, both, {1: None, 2: None}, TurnTaking(both, both), None, 1.0).run()
    turn = ["lease", "wake", "load", "generate", "score", "sleep", "put"]
    assert both.log == ["sleep", *turn, *turn, "lease"]
