"""The vLLM engine against transformers, on real vLLM: log-probabilities, seeds, versions."""

import copy
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from actors import policy, probe
from actors.actor import RolloutActor
from actors.engine import Request
from actors.prompts import Prompt
from actors.rollout import GENERATION_FAILED, VALID, GroupId, Rollouts, Version
from actors.torch_engine import TorchEngine
from cluster import inputs
from configs.load import prepare
from configs.schema import BanditPolicyConfig
from learner import cells
from learner.lora import WithoutAdapter
from tests.harness import Local, LocalQueue, LocalRewards

TOLERANCE = 1e-5  # nats, float32
RIGGED_LOGIT = 200.0


@pytest.fixture
def engine(vllm_engine):
    """The engine with settings that a test may change, as they were when it ends."""
    before, ends = vllm_engine.config, vllm_engine.end_tokens
    vllm_engine.config = copy.deepcopy(before)
    yield vllm_engine
    vllm_engine.config, vllm_engine.end_tokens = before, ends


@pytest.fixture(scope="module")
def model(vllm_engine):
    return policy.build(policy.architecture(vllm_engine.config)).eval()


def weights(model, seed: int) -> np.ndarray:
    """Weights of this seed, far from uniform; the model has them afterwards."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return policy.flatten(model)


def requests(*prompts: list[int]) -> list[Request]:
    return [
        Request(GroupId(place, 0), Prompt(np.array(ids, dtype=np.int32), place))
        for place, ids in enumerate(prompts)
    ]


ONE_TOKEN = [[n] for n in range(10)]


@torch.no_grad()
def recomputed(model, block: Rollouts, rollout: int, temperature: float = 1.0) -> np.ndarray:
    """log π of a rollout's tokens by transformers, without a cache, [L]."""
    prompt, response = block.prompt(rollout // block.members), block.response(rollout)
    tokens = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits_TV = model(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits_TV.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()


def stored(block: Rollouts, column: str, rollout: int) -> np.ndarray:
    return getattr(block, column)[block.offset_N1[rollout] : block.offset_N1[rollout + 1]]


def texts(block: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(block.response(n).tolist()) for n in range(len(block.status_N))]


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


def rigged(model, token: int) -> np.ndarray:
    """Weights that give `token` all the probability, whatever came before."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = RIGGED_LOGIT
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[token, 0] = 1.0
    return policy.flatten(model)


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


def probe_text(engine, model) -> np.ndarray:
    config, shape = engine.config, model.config
    return probe.text(config.seed, shape.vocab_size, policy.context(config, shape))


def scores(model, text_NT: np.ndarray) -> np.ndarray:
    return policy.score(lambda token_NT: model(token_NT).logits, text_NT, "cpu")


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
