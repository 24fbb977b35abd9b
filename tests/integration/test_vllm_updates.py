"""Weights that vLLM gets while it generates: each token has its version, and the probe sees it."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from actors import policy
from actors.rollout import VALID, Rollouts, Version
from tests import vllm_samples
from tests.vllm_samples import (
    ONE_TOKEN,
    TOLERANCE,
    probe_text,
    recomputed,
    requests,
    rigged,
    scores,
    stored,
    texts,
    weights,
)

engine, model = vllm_samples.engine, vllm_samples.model


def generate_under_updates(
    engine, asked, make: Callable[[int], np.ndarray]
) -> tuple[Rollouts, list[np.ndarray]]:
    """A block whose generation the versions 0, 1, … of `make` interrupt, one after another."""
    made = [make(0)]
    engine.load(made[0], Version(0, 0))
    blocks: list[Rollouts] = []
    thread = threading.Thread(target=lambda: blocks.append(engine.generate(asked, "rollout")))
    thread.start()
    while thread.is_alive() and len(made) < 99:
        made.append(make(len(made)))
        engine.load(made[-1], Version(0, len(made) - 1))
        time.sleep(0.01)
    thread.join(60.0)
    assert blocks, "generation did not end"
    return blocks[0], made


@pytest.mark.parametrize("prompt", [[5], [3, 1, 4] * 15])  # the long one is in the prefix cache
def test_every_token_has_the_version_that_its_text_shows(engine, model, prompt):
    engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 100, 8
    weights(model, 1)
    asked = requests(*[prompt] * 8)
    block, _ = generate_under_updates(engine, asked, lambda step: rigged(model, step))
    assert (block.length_N == 100).all()
    assert (block.token_K == block.step_K).all()
    assert np.abs(block.logp_K).max() <= TOLERANCE
    assert len(np.unique(block.step_K)) >= 4
    for n in range(64):
        assert (np.diff(stored(block, "step_K", n)) >= 0).all()


def test_an_update_given_up_before_the_pause_leaves_nothing_to_the_next(engine, model, monkeypatch):
    engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 100, 8
    engine.load(weights(model, 1), Version(0, 1))
    core = engine.llm.engine_core

    async def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no pause")

    asked = requests(*[[3, 1, 4] * 15] * 8)
    thread = threading.Thread(target=lambda: engine.generate(asked, "rollout"))
    thread.start()
    while not engine._running:
        time.sleep(0.001)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no pause"):
        broken.setattr(core, "pause_scheduler_async", fails)
        engine.load(weights(model, 2), Version(0, 2))
    thread.join(60.0)
    assert engine.version == Version(0, 1) and not engine._running
    engine.load(weights(model, 3), Version(0, 3))
    text_NT = probe_text(engine, model)
    assert np.abs(engine.score(text_NT) - scores(model, text_NT)).max() <= TOLERANCE


def test_tokens_after_an_update_see_nothing_of_the_old_weights(engine, model):
    """Caches are computed anew: each token's log-probability is its version's, of all the text."""
    engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 100, 4
    asked = requests([9], [3, 1, 4] * 15, [3, 1, 4] * 15)
    block, versions = generate_under_updates(engine, asked, lambda step: weights(model, step))
    assert len(np.unique(block.step_K)) >= 4
    for step in np.unique(block.step_K):
        policy.unflatten(model, versions[step])
        for n in range(len(block.status_N)):
            mine = stored(block, "step_K", n) == step
            if mine.any():
                apart = stored(block, "logp_K", n) - recomputed(model, block, n)
                assert np.abs(apart[mine]).max() <= TOLERANCE


def test_scores_of_the_probe_are_those_of_transformers_and_change_no_rollout(engine, model):
    engine.load(weights(model, 4), Version(0, 4))
    text_NT = probe_text(engine, model)
    block = engine.generate(requests(*ONE_TOKEN), "rollout")
    engine.config.rollout.temperature = 0.6  # the probe's is 1 whatever the rollouts'
    for _ in range(2):
        apart_NL = engine.score(text_NT) - scores(model, text_NT)
        assert apart_NL.shape == (4, 10) and np.abs(apart_NL).max() <= TOLERANCE
    engine.config.rollout.temperature = 1.0
    assert texts(engine.generate(requests(*ONE_TOKEN), "rollout")) == texts(block)


def test_right_after_an_update_in_mid_generation_the_probe_agrees(engine, model, monkeypatch):
    engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 100, 8
    text_NT, load, apart = probe_text(engine, model), engine.load, []

    def load_and_probe(flat: np.ndarray, version: Version) -> None:
        load(flat, version)
        running = engine._running > 0
        scores_NL = engine.score(text_NT)
        apart.append((running, np.abs(scores_NL - scores(model, text_NT)).max()))

    monkeypatch.setattr(engine, "load", load_and_probe)
    block, _ = generate_under_updates(
        engine, requests(*[[3, 1, 4] * 15] * 8), lambda step: weights(model, step)
    )
    assert (block.status_N == VALID).all() and (block.length_N == 100).all()
    assert sum(running for running, _ in apart) >= 4
    assert max(nats for _, nats in apart) <= TOLERANCE
