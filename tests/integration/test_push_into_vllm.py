"""Weights pushed into real vLLM by its own trainer class, over a stand-in for NCCL only.

AsyncLLM and its worker run on the CPU; the rendezvous, the packing, the protocol's steps, the layer
by layer reload and our side of all of it are what a GPU would run.
"""

import importlib.util
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from actors import policy
from actors.engine import NO_VERSION
from actors.rollout import VALID, Version
from configs.load import prepare
from configs.schema_vllm import Transfer
from learner import vllm_push
from learner.transfer import TransferGroup
from learner.vllm_push import VllmTransport
from tests import stand_in
from tests.vllm_samples import (
    ONE_TOKEN,
    TOLERANCE,
    recomputed,
    requests,
    rigged,
    stored,
    weights,
)

SECONDS = 10.0


@pytest.fixture(scope="module")
def engine(small_policy: list[str]) -> Iterator[Any]:
    """vLLM as on a GPU with rollout.transfer=nccl, but for the devices; its own 25 s of start."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from actors.vllm_engine import VllmEngine

    config = prepare("bandit_vllm", [*small_policy, f"limits.transfer_seconds={SECONDS}"])
    config.rollout.transfer = Transfer.nccl  # which the rules allow with GPUs only
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.vllm_process.WORKER_EXTENSION", "tests.stand_in.WorkerExtension")
        engine = VllmEngine(config)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(engine):
    return policy.build(policy.architecture(engine.config)).eval()


@pytest.fixture
def group(engine, model, monkeypatch) -> TransferGroup:
    """The learner's side: this process, its devices stood in for, too."""
    for owner, name, value in stand_in.patches():
        monkeypatch.setattr(owner, name, value)
    layout = [(n, p.dtype, tuple(p.shape)) for n, p in policy.named(model)]
    group = TransferGroup(VllmTransport(engine.config, layout, ask, "127.0.0.1"), SECONDS)
    group.join(0, engine)
    return group


def ask(actors: Any, step: str, payloads: Any) -> dict[int, str]:
    failed = {}
    for index, engine in actors.items():
        try:
            if step != "ready":
                engine.push(step, payloads[index])
        except Exception as error:
            failed[index] = str(error)
    return failed


def push(group: TransferGroup, model, step: int, parts: int | None = None) -> bool:
    """Push the model's weights as this step's; `parts`: only so many parameters, then nothing."""
    sending = group.begin(Version(0, step))
    assert sending is not None
    for name, parameter in list(policy.named(model))[:parts]:
        sending.feed(name, parameter.detach())
    if parts is not None:
        time.sleep(SECONDS)
    return sending.end()


def test_pushed_weights_are_the_ones_that_generate_and_carry_their_version(engine, model, group):
    for step in (1, 2):
        weights(model, step)
        assert push(group, model, step)
        assert engine.version == Version(0, step)
        block = engine.generate(requests(*ONE_TOKEN, [3, 4, 5] * 12), "rollout")
        assert (block.status_N == VALID).all()
        assert set(block.step_K) == {step} and set(block.lineage_K) == {0}
        for n in range(len(block.status_N)):
            assert (
                np.abs(stored(block, "logp_K", n) - recomputed(model, block, n)).max() < TOLERANCE
            )
    assert group.state.epoch == 1 and group.failures == 0


def test_both_ways_give_the_same_policy_and_may_follow_each_other(engine, model, group):
    flat = weights(model, 3)
    engine.load(flat, Version(0, 3))
    by_host = engine.generate(requests(*ONE_TOKEN), "rollout")
    assert push(group, model, 4)
    by_push = engine.generate(requests(*ONE_TOKEN), "rollout")
    assert np.array_equal(by_host.token_K, by_push.token_K)
    assert np.array_equal(by_host.logp_K, by_push.logp_K)
    assert (set(by_host.step_K), set(by_push.step_K)) == ({3}, {4})
    engine.load(weights(model, 5), Version(0, 5))
    assert set(engine.generate(requests([1]), "rollout").step_K) == {5}


def test_pushes_in_mid_generation_tell_every_token_its_version(engine, model, group):
    engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 100, 8
    try:
        weights(model, 1)
        engine.load(rigged(model, 0), Version(0, 0))
        blocks = []
        asked = requests(*[[3, 1, 4] * 15] * 8)
        thread = threading.Thread(target=lambda: blocks.append(engine.generate(asked, "rollout")))
        thread.start()
        step = 0
        while thread.is_alive() and step < 99:
            step += 1
            rigged(model, step)
            assert push(group, model, step)
            time.sleep(0.01)
        thread.join(60.0)
    finally:
        engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 10, 10
    (block,) = blocks
    assert (block.length_N == 100).all() and (block.token_K == block.step_K).all()
    assert len(np.unique(block.step_K)) >= 4


def test_a_push_that_stops_half_way_leaves_no_version_and_the_host_path_sets_it_right(
    engine, model, group, monkeypatch
):
    monkeypatch.setattr(vllm_push, "BUFFER_BYTES", 1024)  # so that some layers are loaded by then
    weights(model, 6)
    assert push(group, model, 6)
    started = time.monotonic()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)  # what must not be found in the engine afterwards
    assert not push(group, model, 7, parts=7)  # a layer has its weight, not its bias
    until = time.monotonic() + 3 * SECONDS
    while engine.version != NO_VERSION and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.version == NO_VERSION and time.monotonic() - started < 4 * SECONDS
    engine.load(weights(model, 8), Version(0, 8))
    block = engine.generate(requests(*ONE_TOKEN), "rollout")
    assert set(block.step_K) == {8}
    for n in range(len(block.status_N)):
        assert np.abs(stored(block, "logp_K", n) - recomputed(model, block, n)).max() < TOLERANCE
    weights(model, 9)
    assert push(group, model, 9) and group.state.epoch == 2
    block = engine.generate(requests([2]), "rollout")
    assert set(block.step_K) == {9}
    assert np.abs(stored(block, "logp_K", 3) - recomputed(model, block, 3)).max() < TOLERANCE
