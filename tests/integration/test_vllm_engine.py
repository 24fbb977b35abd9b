"""The vLLM engine against transformers, on real vLLM: log-probabilities, seeds, versions."""

import numpy as np
import pytest
import torch

from actors import policy
from actors.actor import RolloutActor
from actors.rollout import GENERATION_FAILED, VALID, Version
from actors.torch_engine import TorchEngine
from cluster import inputs
from configs.load import prepare
from configs.schema import BanditPolicyConfig
from learner import cells
from learner.lora import WithoutAdapter
from tests import vllm_samples
from tests.harness import Local, LocalQueue, LocalRewards
from tests.vllm_samples import ONE_TOKEN, TOLERANCE, recomputed, requests, stored, texts, weights

engine, model = vllm_samples.engine, vllm_samples.model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_sampled_distribution(engine, model, temperature):
    engine.load(weights(model, 1), Version(0, 1))
    engine.config.rollout.temperature = temperature
    block = engine.generate(requests(*ONE_TOKEN, [3, 4, 5] * 12), "rollout")
    assert (block.status_N == VALID).all() and (block.length_N == 10).all()
    assert not block.truncated_N.any() and block.temperature == temperature
    for n in range(len(block.status_N)):
        apart = stored(block, "logp_K", n) - recomputed(model, block, n, temperature)
        assert np.abs(apart).max() <= TOLERANCE


def test_equal_seeds_give_equal_responses_whatever_else_is_in_the_batch(engine, model):
    engine.load(weights(model, 2), Version(0, 2))
    asked = requests(*ONE_TOKEN)
    block = engine.generate(asked, "rollout")
    alone = engine.generate(asked[4:5], "rollout")
    assert texts(engine.generate(asked, "rollout")) == texts(block)
    assert texts(alone) == texts(block)[40:50]
    for group in range(10):
        assert len(set(texts(block)[10 * group : 10 * group + 10])) == 10
    assert texts(engine.generate(asked, "eval")) != texts(block)


def test_samples_follow_the_policy(engine, model):
    engine.load(weights(model, 3), Version(0, 3))
    engine.config.rollout.max_tokens, engine.config.rollout.responses_per_prompt = 1, 4000
    block = engine.generate(requests([7]), "rollout")
    with torch.no_grad():
        p = model(torch.tensor([[7]])).logits[0, -1].double().softmax(-1).numpy()
    count = np.bincount(block.token_K, minlength=len(p))
    chi_squared = ((count - 4000 * p) ** 2 / (4000 * p)).sum()
    degrees = len(p) - 1
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


def test_new_weights_change_version_and_log_probabilities(engine, model):
    for step in (5, 6):
        flat = weights(model, step)
        engine.load(flat, Version(1, step))
        block = engine.generate(requests([1], [2]), "rollout")
        assert set(block.step_K) == {step} and set(block.lineage_K) == {1}
        assert engine.version == Version(1, step)
        assert np.abs(stored(block, "logp_K", 7) - recomputed(model, block, 7)).max() <= TOLERANCE
        flat[:] = 0.0  # the engine has its own copy
        again = engine.generate(requests([1], [2]), "rollout")
        assert texts(again) == texts(block)
    with pytest.raises(ValueError, match=r"weights have 3 numbers, this architecture \d+"):
        engine.load(np.zeros(3, dtype=np.float32), Version(1, 7))


def test_merged_weights_of_an_adapter_sample_as_the_adapter_beside_its_base_does(
    engine, small_policy
):
    config = prepare("bandit_vllm", [
        *small_policy, "learner.lora.rank=8", "learner.lr=0.02", "learner.updates=10",
    ])  # fmt: skip
    local = Local(config)
    list(local.steps(10))
    assert np.abs(local.learner.weights() - local.learner.reference.weights()).max() > 0.01
    engine.load(local.learner.weights(), Version(0, 10))
    block = engine.generate(requests(*ONE_TOKEN), "rollout")
    beside = local.learner.engine.policy.eval()
    for n in range(100):
        apart = stored(block, "logp_K", n) - recomputed(beside, block, n)
        assert np.abs(apart).max() <= 3 * TOLERANCE  # merging rounds, too
    apart = stored(block, "logp_K", 0) - recomputed(WithoutAdapter(beside), block, 0)
    assert np.abs(apart).max() > 1000 * TOLERANCE


def test_an_end_token_ends_the_response_and_belongs_to_it(engine, model):
    engine.load(weights(model, 8), Version(0, 8))
    engine.config.rollout.max_tokens = 30
    engine.end_tokens = (11, 12)
    block = engine.generate(requests(*ONE_TOKEN), "rollout")
    ended = 0
    for n in range(100):
        response = block.response(n)
        ends = np.isin(response, engine.end_tokens)
        assert not ends[:-1].any()
        assert block.truncated_N[n] == (not ends[-1]) and (ends[-1] or len(response) == 30)
        assert np.abs(stored(block, "logp_K", n) - recomputed(model, block, n)).max() <= TOLERANCE
        ended += int(ends[-1])
    assert 0 < ended < 100


@pytest.mark.parametrize("prompt", [[1] * 151, []])
def test_a_prompt_that_does_not_fit_is_a_stated_failure(engine, model, prompt):
    engine.load(weights(model, 1), Version(0, 1))
    block = engine.generate(requests([1], prompt, [2]), "rollout")
    assert block.status_N.tolist() == [VALID] * 10 + [GENERATION_FAILED] * 10 + [VALID] * 10
    assert block.length_N.tolist() == [10] * 10 + [0] * 10 + [10] * 10
    assert block.failures[10] == f"prompt of {len(prompt)} tokens; the context leaves 1 … 150"


def test_a_token_outside_the_vocabulary_is_a_stated_failure(engine, model):
    """vLLM's whole engine would die of it."""
    engine.load(weights(model, 1), Version(0, 1))
    block = engine.generate(requests([1], [5, 100], [2]), "rollout")
    assert block.status_N.tolist() == [VALID] * 10 + [GENERATION_FAILED] * 10 + [VALID] * 10
    assert block.failures[19] == "prompt with token 100; the vocabulary has 0 … 99"


KINDS = pytest.mark.parametrize("kind", ["torch", "vllm"])


def local_run(kind: str, engine, small_policy, *overrides: str) -> Local:
    """Algorithm 1 in one process, over the engine asked for."""
    config = prepare("bandit_vllm", [*small_policy, f"rollout.engine={kind}", *overrides])
    local = Local(config)
    if kind == "vllm":
        actor = local.actors[0]
        rewards, queue = LocalRewards(config), LocalQueue(local.queue)
        local.actors = [RolloutActor(0, engine, actor.prompts, queue, rewards, 10.0)]
    assert isinstance(local.actors[0].engine, TorchEngine) == (kind == "torch")
    return local


@KINDS
@pytest.mark.parametrize(
    "overrides, ages",
    [
        (["replay.lag=2"], [0, 1, 2, 2, 2, 2]),
        (["replay.schedule=pipelined", "replay.max_age=3"], [0, 1, 2, 3, 3, 3]),
        (["replay.schedule=pipelined", "replay.max_age=0"], [0] * 6),
    ],
)
def test_ages_and_the_budget_are_the_same_over_either_engine(
    engine, small_policy, kind, overrides, ages
):
    local = local_run(
        kind, engine, small_policy, "learner.updates=6", "replay.inner_epochs=1",
        "replay.samples_per_round=20", "learner.minibatch=20", *overrides,
    )  # fmt: skip
    seen = [set(record.index["age"]) for record in local.steps(6)]
    assert seen == [{age} for age in ages]
    counts = local.queue.ledger.counts()
    assert counts["issued"] == sum(counts["retired"].values()) == 120
    assert counts["retired"]["exhausted"] == 120 and counts["retired"]["expired"] == 0


@KINDS
def test_the_queue_sees_no_difference_between_engines(engine, small_policy, kind):
    local = local_run(kind, engine, small_policy, "learner.updates=20")
    records = list(local.steps(20))
    ledger = local.queue.ledger
    assert dict(ledger.age) == dict.fromkeys(range(10), 200)
    assert dict(ledger.reuse) == dict.fromkeys(range(1, 11), 200)
    assert ledger.issued == 200 and ledger.in_flight == ledger.queued == 0
    assert {reason: n for reason, n in ledger.retired.items() if n} == {"exhausted": 200}
    assert all(record.stepped for record in records)
    known = [cells.engine_mismatch(record.cells) for record in records]
    assert [kl is not None for kl in known] == ([True] + [False] * 9) * 2
    assert all(kl <= TOLERANCE for kl in known if kl is not None)
    probed = [record.queue["engine_mismatch_probe"] for record in records]
    assert [nats is not None for nats in probed] == ([True] + [False] * 9) * 2
    assert all(nats <= TOLERANCE for nats in probed if nats is not None)


def test_a_head_size_that_vllm_does_not_know_ends_before_anything_starts(tmp_path):
    shape = policy.bandit_architecture(BanditPolicyConfig(width=48, heads=3), 10)
    policy.write_architecture(shape, str(tmp_path))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [1]}\n')
    paths = [f"policy.path={tmp_path}", "prompts.source=jsonl", f"prompts.path={prompts}"]
    with pytest.raises(ValueError, match=r"head size 16, and vLLM's CPU attention knows 32, 64"):
        inputs.check(prepare("bandit_vllm", paths))
