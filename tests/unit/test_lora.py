"""An adapter's base stays as it was; merged into it or beside it, the adapter is one policy."""

import copy

import numpy as np
import pytest
import torch

from actors import policy
from cluster import inputs
from configs.errors import ConfigError
from configs.schema_lora import LoraConfig
from learner import cells, lora
from learner.lora import WithoutAdapter
from tests import varying
from tests.harness import Local, settings
from tests.low_rank import BANDIT, RANK, adapted, flat


def logits(network) -> torch.Tensor:
    text_NT = torch.randint(0, varying.VOCABULARY, (3, 12), generator=torch.manual_seed(2))
    with torch.no_grad():
        return network(text_NT, use_cache=False).logits


# --- merged, and beside the weights ----------------------------------------------------------


@pytest.mark.parametrize("shape", varying.SHAPES)
def test_the_merged_weights_are_the_adapter_beside_the_base(shape):
    plain, network = adapted(shape)
    names, shapes = policy.layout(plain.config)
    pieces = lora.pieces(network)
    assert [piece.name for piece in pieces] == names
    assert [list(piece.whole().shape) for piece in pieces] == shapes
    merged = copy.deepcopy(plain)
    policy.unflatten(merged, flat(network))
    scale = logits(plain).abs().max()
    assert (logits(merged) - logits(network)).abs().max() < 1e-5 * scale
    assert (logits(merged) - logits(plain)).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_merged_weight_is_what_peft_merges(shape):
    _, network = adapted(shape)
    ours = {piece.name: piece.whole() for piece in lora.pieces(network)}
    layers = [(n, layer) for n, layer in network.named_modules() if hasattr(layer, "lora_A")]
    assert layers
    for name, layer in layers:
        layer.merge()
        assert torch.allclose(ours[f"{name}.weight"], layer.base_layer.weight, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_without_its_adapter_a_network_is_what_it_was_and_is_left_as_it_is(precision):
    plain, network = adapted("gpt2", precision, dropout=0.5)
    network.train()
    before = [p.requires_grad for p in network.parameters()]
    reference = WithoutAdapter(network)
    assert torch.equal(logits(reference), logits(plain))
    assert all(torch.equal(a, b) for a, b in zip(reference.base(), plain.parameters()))
    assert network.training and [p.requires_grad for p in network.parameters()] == before
    assert not torch.equal(logits(network), logits(plain))


def test_reading_the_weights_leaves_bfloat16_parameters_where_the_optimizer_has_them():
    _, network = adapted("llama", torch.bfloat16)
    before = [(p.data_ptr(), p.dtype) for p in network.parameters()]
    assert np.isfinite(flat(network)).all()
    assert [(p.data_ptr(), p.dtype) for p in network.parameters()] == before
    assert {dtype for _, dtype in before} == {torch.bfloat16}


def test_targets_are_all_linear_layers_but_the_output_layer_or_those_named():
    network = varying.network("llama")
    all_of_them = lora.targets(network, LoraConfig(rank=4), "learner.lora")
    assert {name.rpartition(".")[2] for name in all_of_them} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    named = lora.targets(network, LoraConfig(rank=4, targets="q_proj,layers.1.mlp.up_proj"), "x")
    assert sorted(named) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        inputs.check(settings("bandit", *RANK, "learner.lora.targets=c_attn,q_proj"))
    assert str(refused.value) == (
        "learner.lora.targets=c_attn,q_proj: GPT2LMHeadModel has no linear layer q_proj under its "
        "output layer; name some of c_attn, c_fc or c_proj"
    )


# --- a run -----------------------------------------------------------------------------------


def test_the_bandit_learns_with_an_adapter_and_its_base_stays():
    """To the most that there is without the output layer and the last norm: 0.286, where training
    all weights comes to 1."""
    local = Local(settings(*BANDIT, "learner.updates=48"))
    initial, plain = local.learner.reference.weights(), local.learner.weights().copy()
    assert np.array_equal(initial, plain)  # B is 0
    rewards, mismatch = [], []
    for record in local.steps(48):
        rewards.append(record.index["reward_mean"])
        mismatch.append(cells.engine_mismatch(record.cells))
    assert np.mean(rewards[-8:]) > 0.2 > 3 * rewards[0]
    assert np.array_equal(local.learner.reference.weights(), initial)
    published = local.queue.weights[48][0]
    assert np.array_equal(published, local.learner.weights())
    known = [nats for nats in mismatch if nats is not None]
    assert len(known) >= 5 and max(known) < 1e-7  # merged and beside are one policy


def run(*overrides: str) -> tuple[list[float], np.ndarray]:
    local = Local(settings(*BANDIT, "learner.updates=4", *overrides))
    losses = [record.loss for record in local.steps(4)]
    return losses, local.learner.weights().copy()


def test_zero_stages_and_micro_batches_change_no_loss():
    whole = run()
    for overrides in (
        ["learner.zero_stage=1"], ["learner.zero_stage=2", "learner.micro_batch=20"],
        ["learner.zero_stage=3"],
    ):  # fmt: skip
        parts = run(*overrides)
        assert np.allclose(whole[0], parts[0], atol=1e-5), overrides
        assert np.abs(whole[1] - parts[1]).mean() < 1e-5


def test_the_reference_without_a_copy_of_the_weights_is_the_one_with_it():
    """Under ZeRO-3 there is a copy."""
    common = ("objective.kl_loss=0.1", "learner.exact_kl=false", "learner.packing=true")
    shared, copied = run(*common), run(*common, "learner.zero_stage=3")
    assert np.allclose(shared[0], copied[0], atol=1e-5)


def test_a_value_head_trains_beside_an_adapter():
    local = Local(settings("bandit_ppo_value", *RANK, "learner.updates=20", "learner.lr=5e-3"))
    initial = local.learner.reference.weights().copy()
    assert all(record.stepped for record in local.steps(20))
    head = local.learner.engine.engine.module.value_head
    assert head.weight.abs().max() > 0
    assert np.array_equal(local.learner.reference.weights(), initial)
