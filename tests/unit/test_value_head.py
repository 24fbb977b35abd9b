"""PPO with a value head in the learner: what it keeps, publishes, checkpoints and steers."""

import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from actors import policy
from configs.schema_value import ValueConfig
from learner import cells, checkpoint
from learner.advantages import ADVANTAGE, RETURN, VALUE
from learner.batch import forward, pad, values
from learner.objectives import Objective
from learner.packing import logps_and_values, response_logps
from learner.value_head import WithValueHead, policy_of
from tests import varying
from tests.harness import Local, settings

PRESET = "bandit_ppo_value"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES = {
    "gpt2": GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=11, max_position_embeddings=16, intermediate_size=32, **SMALL
    ),
    "llama": LlamaConfig(vocab_size=11, max_position_embeddings=16, intermediate_size=32, **SMALL),
}


def network(shape: str, **value: bool) -> WithValueHead:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape]).eval()
    net = WithValueHead(model, ValueConfig(**value))
    torch.nn.init.normal_(net.value_head.weight)
    return net


@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_is_of_its_prefix_and_logits_are_the_policys(shape: str) -> None:
    net = network(shape)
    tokens = torch.randint(0, 11, (3, 7))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    with torch.no_grad():
        out, other = net(tokens, use_cache=False), net(changed, use_cache=False)
        alone = policy_of(net)(tokens, use_cache=False)
    assert torch.equal(out.logits, alone.logits)
    assert out.value.shape == (3, 7, 1) and out.value.std() > 0.01
    apart_T = (out.value - other.value).abs().amax((0, 2))
    assert apart_T[:4].max() < 1e-6 and apart_T[4:].min() > 1e-4


@pytest.mark.parametrize("detached", [False, True])
def test_the_value_loss_trains_the_policy_unless_detached(detached: bool) -> None:
    net = network("gpt2", detached=detached)
    net(torch.randint(0, 11, (3, 7)), use_cache=False).value.sum().backward()
    assert net.value_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in policy.parameters(net.policy)) == detached


@pytest.mark.parametrize("shape", varying.SHAPES)
def test_values_of_packed_and_padded_rows_are_those_of_each_prefix(shape: str) -> None:
    net = WithValueHead(varying.network(shape).eval(), ValueConfig())
    torch.nn.init.normal_(net.value_head.weight)
    batch = pad(varying.rollouts())
    with torch.no_grad():
        expected = values(forward(net, batch), batch)
        for packing in (False, True):
            logp_NL, value_NL = logps_and_values(net, batch, packing)
            assert torch.allclose(value_NL, expected, atol=1e-4)
            assert torch.allclose(logp_NL, response_logps(net.policy, batch, packing))
    assert not expected[~batch.mask_NL].any() and expected[batch.mask_NL].std() > 0.1


def losses(config, updates: int) -> list[float]:
    return [record.loss for record in Local(config).steps(updates)]


def test_the_value_head_is_trained_and_never_leaves_the_learner() -> None:
    local = Local(settings(PRESET, "learner.updates=3"))
    plain = policy.build(policy.architecture(local.config))
    before = local.learner.engine.engine.module.value_head.weight.clone()
    list(local.steps(3))
    learner = local.learner
    assert not torch.equal(before, learner.engine.engine.module.value_head.weight)
    names = [name for name, _ in policy.named(plain)]
    assert [name for name, _, _ in learner.engine.layout()] == names
    assert [name for name, _ in learner.engine.gathered()] == names
    assert learner.weights().size == sum(p.numel() for p in policy.parameters(plain))
    policy.unflatten(plain, learner.weights())  # as actors, evaluator and export do


def test_all_passes_see_the_values_and_advantages_of_the_first() -> None:
    config = settings(
        PRESET, "learner.updates=8", "replay.inner_epochs=4", "learner.micro_batch=30",
        "learner.lr=0.01",
    )  # fmt: skip
    local = Local(config)
    for _ in range(2):  # rounds, of four passes each
        stored = []
        for number in range(4):
            local.generate()
            block = local.queue.get(0, local.queue.committed, 0).block
            assert bool(block.derived) == (number > 0)
            stored.append(dict(block.derived))
            list(local.steps(1))
        for name in (ADVANTAGE, VALUE, RETURN):
            assert np.array_equal(stored[1][name], stored[2][name])
            assert np.array_equal(stored[1][name], stored[3][name])
    advantage_NL = pad(block).mask_NL.numpy()
    assert advantage_NL.all() and stored[1][ADVANTAGE].mean() == pytest.approx(0, abs=1e-5)
    assert stored[1][ADVANTAGE].std() == pytest.approx(1, abs=1e-2)
    assert stored[1][VALUE].std() > 1e-4


@pytest.mark.parametrize(
    "override",
    [
        "learner.micro_batch=30",
        "learner.packing=true",
        "learner.zero_stage=2",
        "learner.zero_stage=3",
    ],
)
def test_micro_batches_and_zero_stages_change_no_loss(override: str) -> None:
    common = (PRESET, "learner.updates=4", "replay.inner_epochs=2")
    whole, parts = losses(settings(*common), 4), losses(settings(*common, override), 4)
    assert np.allclose(whole, parts, atol=1e-5) and abs(whole[1]) > 1e-5


def test_a_kl_penalty_in_the_reward_is_in_the_returns_of_each_token() -> None:
    """γ = λ = 1 and no value yet: the return is the reward to go."""
    config = settings(
        PRESET, "learner.updates=2", "objective.kl_reward=0.5", "objective.kl_target=null",
        "objective.value.lam=1", "objective.value.coefficient=0", "replay.inner_epochs=1",
        "learner.lr=0.01",
    )  # fmt: skip
    local = Local(config)
    list(local.steps(1))  # away from π_ref
    local.generate()
    block = local.queue.get(0, 1, 0).block
    _, derived = local.learner.consume(local.queue.get(0, 1, 0))
    log_ratio = (block.logp_K - derived["reference_logp_K"]).reshape(-1, 10)
    to_go = block.reward_N[:, None] - 0.5 * log_ratio[:, ::-1].cumsum(1)[:, ::-1]
    assert np.abs(log_ratio).max() > 0.1 and not derived[VALUE].any()
    np.testing.assert_allclose(derived[RETURN].reshape(-1, 10), to_go, atol=1e-5)


def test_beta_adapts_on_fresh_rollouts_only_and_not_on_a_skipped_step() -> None:
    config = settings(
        PRESET, "learner.updates=7", "replay.inner_epochs=3", "objective.kl_target=1000",
        "objective.kl_horizon=100",
    )  # fmt: skip
    local = Local(config)
    seen = []
    for number in range(7):
        real = local.learner.objective
        if number == 3:  # a first pass, which is skipped
            nan = Objective(real.name, real.traits, lambda x, s: x.logp_NL.sum() * float("nan"))
            local.learner.objective = nan
        record = next(local.steps(1))
        local.learner.objective = real
        assert record.stepped == (number != 3)
        seen.append(record.kl_coefficient)
    factor = 0.8  # 1 − 0.2 · 100/100, far under the target
    expected = [1, factor, factor, factor, factor, factor, factor]
    np.testing.assert_allclose(seen, 0.001 * np.array(expected))
    assert local.learner.kl.coefficient == pytest.approx(0.001 * factor**2)


def test_head_and_beta_come_back_from_a_checkpoint(tmp_path) -> None:
    config = settings(PRESET, "learner.updates=4", "replay.inner_epochs=2")
    local = Local(config)
    list(local.steps(3))
    saved = local.learner
    checkpoint.save(saved, saved.engine.writer, str(tmp_path), [])
    deadline = time.monotonic() + 30
    while not saved.engine.writer.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other = Local(config).learner
    assert other.kl.coefficient != saved.kl.coefficient
    checkpoint.load(other, str(tmp_path), 1)
    assert other.kl.coefficient == saved.kl.coefficient
    for (name, mine), (_, theirs) in zip(
        saved.engine.engine.module.named_parameters(), other.engine.engine.module.named_parameters()
    ):
        assert torch.equal(mine, theirs), name


def test_the_measures_of_the_value_head_are_those_of_its_columns() -> None:
    config = settings(PRESET, "learner.updates=2", "replay.inner_epochs=2", "learner.lr=1e-9")
    local = Local(config)
    records = list(local.steps(1))
    block = local.queue.get(0, 1, 0).block
    records += local.steps(1)
    value, target = block.derived[VALUE], block.derived[RETURN]
    for record in records:
        measured = cells.finish(cells.total(record.cells))
        loss = 0.5 * np.mean((value - target) ** 2)  # all ten tokens long
        assert measured["value_loss"] == pytest.approx(loss, rel=1e-4)
        explained = 1 - np.var(target - value) / np.var(target)
        assert measured["value_explained_variance"] == pytest.approx(explained, abs=1e-4)


@pytest.mark.parametrize("preset, weight", [("bandit", 300.0), ("bandit_best_of_n", 100.0)])
def test_a_kl_term_in_the_loss_keeps_any_objective_nearer(preset: str, weight: float) -> None:
    ends = []
    for kl_loss in (0.0, weight):
        config = settings(preset, "learner.updates=15", f"objective.kl_loss={kl_loss}")
        *_, last = Local(config).steps(15)
        ends.append(cells.finish(cells.total(last.cells))["kl_to_reference"])
        assert last.kl_coefficient is None
    assert ends[1] < 0.5 * ends[0]
