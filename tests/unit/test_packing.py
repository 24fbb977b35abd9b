"""Packed, padded and whole distributions: three ways to the same loss and gradient."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from configs.objectives import TABLE
from configs.schema import ObjectiveConfig
from learner.batch import Padded, conditionals, pad, token_logps
from learner.objectives import load
from learner.packing import check_boundaries, cost, fed, first_fit, response_logps, rows
from learner.signals import signals
from tests.harness import Local, settings
from tests.stages import model_directory, write_rows
from tests.varying import SHAPES, VOCABULARY, network, rollouts


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def loss_and_gradient(
    model, batch: Padded, block, name: str, logp_NL
) -> tuple[float, torch.Tensor]:
    """The objective's loss per term and its gradient in all weights."""
    settings = ObjectiveConfig(name=name, tau=0.1, beta=0.5)
    notes = signals(
        block.reward_N, block.label_N, block.status_N == 0, block.members, block.reward_N,
        settings, 0.5,
    )  # fmt: skip
    reference_NL = torch.where(batch.mask_NL, batch.logp_NL + 0.1, 0.0)
    # π_gen a fixed distance from π_θ, or the ratios of random rollouts would all be clipped
    generator_NL = logp_NL.detach() + 0.01
    inputs = notes.loss_inputs(logp_NL, batch.mask_NL, generator_NL, reference_NL)
    loss = load(name).loss(inputs, settings) / notes.count(TABLE[name].per)
    model.zero_grad()
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_log_probabilities_of_each_sequence_alone(shape, attention):
    model, block = network(shape, attention), rollouts()
    block.temperature = 0.7
    batch = pad(block)
    assert len(rows(batch, packing=True).input_RT) < len(rows(batch, packing=False).input_RT)
    with torch.no_grad():
        packed_NL = response_logps(model, batch, packing=True)
        for n in range(len(batch.keys)):
            text = [*block.prompt(n // block.members), *block.response(n)]
            logits = model(torch.tensor([text], dtype=torch.long)).logits[0].double() / 0.7
            length = int(block.length_N[n])
            alone = logits[-length - 1 : -1].log_softmax(-1).gather(
                1, torch.tensor(text[-length:], dtype=torch.long)[:, None]
            )[:, 0]  # fmt: skip
            expected = alone if block.status_N[n] == 0 else torch.zeros(length)
            assert torch.allclose(packed_NL[n, :length].double(), expected.double(), atol=1e-5)
            assert not packed_NL[n, length:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["dpo", "ipo", "ppo", "reinforce", "best_of_n", "rwr"])
def test_packed_padded_and_whole_distributions_give_the_same_loss_and_gradient(shape, name):
    model, block = network(shape), rollouts()
    batch = pad(block)
    whole = loss_and_gradient(
        model, batch, block, name, token_logps(conditionals(model, batch), batch)
    )
    scale = max(1.0, abs(whole[0]))
    size = max(1.0, float(whole[1].abs().max()))
    for packing in (False, True):
        logp_NL = response_logps(model, batch, packing)
        loss, gradient = loss_and_gradient(model, batch, block, name, logp_NL)
        assert abs(loss - whole[0]) < 1e-5 * scale
        assert (gradient - whole[1]).abs().max() < 1e-5 * size


@pytest.mark.parametrize("packing", [False, True])
def test_rollouts_that_all_failed_have_log_probability_and_gradient_0(packing):
    model, block = network("gpt2"), rollouts(groups=1, failed=(0, 1, 2, 3))
    logp_NL = response_logps(model, pad(block), packing)
    logp_NL.sum().backward()
    assert not logp_NL.any() and not gradients(model).any()


@pytest.mark.parametrize("packing", [False, True])
def test_the_output_layer_sees_response_positions_only_and_is_left_as_it_was(packing):
    model, block = network("llama"), rollouts()
    seen: list[tuple[int, ...]] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda head, given, out: seen.append(tuple(out.shape))
    )
    response_logps(model, pad(block), packing)
    hook.remove()
    valid_tokens = int(block.length_N[block.status_N == 0].sum())
    assert seen == [(1, valid_tokens, VOCABULARY)]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCABULARY)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_first_fit_keeps_sequences_apart_and_within_rows_and_wastes_little():
    random = np.random.default_rng(1)
    for _ in range(200):
        length_N = random.integers(1, 60, random.integers(1, 50))
        width = int(length_N.max())
        row_N, start_N = first_fit(length_N, width)
        filled = np.zeros((row_N.max() + 1, width), dtype=int)
        for row, start, length in zip(row_N, start_N, length_N):
            assert start + length <= width
            filled[row, start : start + length] += 1
        assert filled.max() == 1 and filled.sum() == length_N.sum()
        fewest = -(-length_N.sum() // width)
        assert fewest <= len(filled) <= 1.7 * fewest + 1


def test_cost_is_the_size_of_the_rows_that_are_laid_out():
    block = rollouts()
    batch = pad(block)
    fed_N = np.where(block.status_N == 0, fed(batch.lengths()[1]), 0)
    assert rows(batch, packing=False).input_RT.shape == ((fed_N > 0).sum(), fed_N.max())
    for packing in (False, True):
        assert cost(fed_N, packing) == rows(batch, packing).input_RT.numel()
    assert cost(fed_N, True) < 0.7 * cost(fed_N, False)
    assert cost(np.zeros(3, dtype=np.int64), True) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_boundaries_hold_for_the_shapes_we_promise_also_in_bfloat16(shape):
    check_boundaries(network(shape), VOCABULARY)
    check_boundaries(network(shape).bfloat16(), VOCABULARY)


def test_an_architecture_that_reads_no_boundaries_is_refused():
    torch.manual_seed(0)
    shape = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)

    class Careless(BloomForCausalLM):  # positions are ALiBi's, by column: it ignores ours
        def forward(self, input_ids, position_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    with pytest.raises(ValueError, match="learner.packing=false"):
        check_boundaries(Careless(shape), VOCABULARY)


@pytest.mark.parametrize(
    "preset, overrides",
    [("bandit_ppo", ("objective.kl_loss=0.05",)),
     ("bandit_ppo_value", ()),
     ("bandit_dpo", ("learner.micro_tokens=200",))],
)  # fmt: skip
def test_a_whole_run_packed_has_the_losses_of_one_that_is_not(tmp_path, preset, overrides):
    """Two rounds of three passes, over responses of one to twelve tokens."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a b c"[: 1 + 2 * (n % 3)]}
                                                      for n in range(12)])  # fmt: skip
    common = [
        f"policy.path={model_directory(tmp_path / 'model')}", "prompts.source=jsonl",
        f"prompts.path={prompts}", "prompts.count=0", "rollout.responses_per_prompt=4",
        "rollout.max_tokens=12", "reward.kind=length", "reward.target=3", "reward.end_tokens=[0]",
        "replay.samples_per_round=48", "learner.minibatch=24", "replay.inner_epochs=3",
        "learner.updates=12", "learner.lr=3e-3", "learner.exact_kl=false", *overrides,
    ]  # fmt: skip
    found = []
    for packing in ("false", "true"):
        local = Local(settings(preset, *common, f"learner.packing={packing}"))
        losses = [record.loss for record in local.steps(11)]
        lengths = local.queue.get(0, 11, 0).block.length_N
        assert lengths.min() < 6 and lengths.max() == 12
        found.append([*losses, next(local.steps(1)).loss])
    assert np.abs(np.array(found[0])).max() > 1e-3
    assert np.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert np.allclose(found[0][:6], found[1][:6], rtol=1e-5, atol=1e-5)
