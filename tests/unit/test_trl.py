"""Our losses beside TRL's own code: on the same network, rollouts and reference, to 1e-5.

TRL's trainers are not built (they want data sets and an accelerator). Their loss methods run on a
stand-in for `self` that has what they read, and on a real network under TRL's output layer. RLOO's
advantages are given to TRL's loss; the leave-one-out mean itself is written out here.
"""

import importlib
import importlib.util
from collections import defaultdict
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.rollout import Rollouts, offsets
from configs.choices import Advantage, Ratio
from configs.schema import ObjectiveConfig
from learner.batch import pad
from learner.objectives import load
from learner.packing import response_logps
from learner.signals import Signals, signals
from tests.varying import network, rollouts

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)


def stand_in(model: nn.Module, **settings: Any) -> Any:
    """What TRL's loss methods read of a trainer on one process."""
    same = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        autocast=nullcontext,
        is_main_process=True,
    )
    return SimpleNamespace(
        model=model, accelerator=same, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), **settings,
    )  # fmt: skip


def reference() -> nn.Module:
    """Another network than the policy."""
    model = network("gpt_neox")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def ours(
    block: Rollouts, settings: ObjectiveConfig, generator_NL: Tensor | None = None
) -> tuple[float, Tensor, Signals]:
    """Our loss per term, its gradient in the weights, and the signals that it read."""
    model, batch = network("gpt_neox"), pad(block)
    objective = load(settings.name)
    notes = signals(
        block.reward_N, block.label_N, block.status_N == 0, block.members, block.reward_N,
        settings, 0.0,
    )  # fmt: skip
    with torch.no_grad():
        reference_NL = response_logps(reference(), batch, packing=True)
    logp_NL = response_logps(model, batch, packing=True)
    inputs = notes.loss_inputs(logp_NL, batch.mask_NL, generator_NL, reference_NL)
    loss = objective.loss(inputs, settings) / notes.count(objective.traits.per)
    return loss.item(), gradient(model, loss), notes


def trl_dpo(block: Rollouts, loss_type: str, beta: float) -> tuple[float, Tensor]:
    """TRL's DPO loss of a block of pairs, and its gradient."""
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model, frozen = network("gpt_neox"), reference()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_fused_lm_head(frozen)
    trainer = stand_in(
        model, ref_model=frozen, ld_alpha=None, precompute_ref_logps=False, use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], beta=beta,
    )  # fmt: skip
    batch = pad(block)
    reward_GC = block.reward_N.reshape(-1, 2)
    first_G = np.arange(0, len(block.reward_N), 2)
    order = np.concatenate([first_G + reward_GC.argmax(1), first_G + reward_GC.argmin(1)])
    prompt_N, total_N = batch.lengths()
    place_T = np.arange(batch.input_NT.shape[1])
    attention_NT = place_T < total_N[:, None]
    completion_NT = attention_NT & (place_T >= prompt_N[:, None])
    inputs = {
        "input_ids": batch.input_NT[order],
        "attention_mask": torch.from_numpy(attention_NT[order]).long(),
        "completion_mask": torch.from_numpy(completion_NT[order]).long(),
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss.item(), gradient(model, loss)


def trl_rloo(block: Rollouts, generator_NL: Tensor, advantage_N: Tensor) -> tuple[float, Tensor]:
    """TRL's RLOO loss of a block, ε = 0.2, and its gradient."""
    with pytest.MonkeyPatch.context() as patch:  # TRL would import all of vLLM for this class
        utils = importlib.import_module("trl.import_utils")
        patch.setattr(utils, "is_vllm_available", lambda min_version=None: False)
        from trl.trainer.rloo_trainer import RLOOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model, batch = network("gpt_neox"), pad(block)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    trainer = stand_in(model, epsilon_low=0.2, epsilon_high=0.2)
    scores = RLOOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = MethodType(scores, trainer)
    prompts = [block.prompt(n // block.members) for n in range(len(block.reward_N))]
    width = max(map(len, prompts))
    prompt_NP, there_NP = torch.zeros((2, len(prompts), width), dtype=torch.long)
    for n, prompt in enumerate(prompts):  # TRL pads prompts on the left
        prompt_NP[n, width - len(prompt) :] = torch.from_numpy(prompt)
        there_NP[n, width - len(prompt) :] = 1
    inputs = {
        "prompt_ids": prompt_NP,
        "prompt_mask": there_NP,
        "completion_ids": batch.token_NL,
        "completion_mask": batch.mask_NL.long(),
        "old_logps": (generator_NL * batch.mask_NL).sum(1),
        "advantages": advantage_N,
    }
    loss = RLOOTrainer._compute_loss(trainer, model, inputs)
    return loss.item(), gradient(model, loss)


def agree(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> None:
    """Loss and gradient to 1e-5, of themselves where they are over 1."""
    assert one[0] == pytest.approx(other[0], abs=1e-5, rel=1e-5)
    size = max(1.0, float(other[1].abs().max()))
    assert other[1].abs().max() > 1e-3
    assert (one[1] - other[1]).abs().max() < 1e-5 * size


@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_dpo_is_trls(beta):
    block = rollouts(groups=6, members=2, failed=())
    agree(ours(block, ObjectiveConfig(name="dpo", beta=beta))[:2], trl_dpo(block, "sigmoid", beta))


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_of_equal_lengths_is_trls_times_the_length_squared(beta):
    """TRL's IPO averages log-ratios per token: (margin/L − 1/(2β))² for responses of L tokens. Ours
    sums them, as equation (20) of arXiv 2404.14367: with τ = β/L it is L² times that."""
    block, length = rollouts(groups=6, members=2, failed=()), 7
    n = len(block.reward_N)
    random = np.random.default_rng(2)
    block.offset_N1 = offsets([length] * n)
    block.token_K = random.integers(0, 40, n * length).astype(np.int32)
    for column in ("logp_K", "lineage_K", "step_K"):
        setattr(block, column, np.resize(getattr(block, column), n * length))
    loss, slope, _ = ours(block, ObjectiveConfig(name="ipo", tau=beta / length))
    agree((loss / length**2, slope / length**2), trl_dpo(block, "ipo", beta))


def rloo(block: Rollouts) -> tuple[ObjectiveConfig, Tensor]:
    """Settings of PPO that are RLOO, and its advantages, written out."""
    reward_GC = torch.from_numpy(block.reward_N).view(-1, block.members)
    mean_of_others_GC = (reward_GC.sum(1, keepdim=True) - reward_GC) / (block.members - 1)
    settings = ObjectiveConfig(
        name="ppo", ratio=Ratio.sequence, advantage=Advantage.leave_one_out, epsilon=0.2
    )
    return settings, (reward_GC - mean_of_others_GC).flatten()


def generator(block: Rollouts, spread: float) -> Tensor:
    """log π_gen of the tokens: the policy's, each sequence off it by up to `spread` nats."""
    batch = pad(block)
    with torch.no_grad():
        logp_NL = response_logps(network("gpt_neox"), batch, packing=False)
    off_N = torch.linspace(-spread, spread, len(logp_NL))
    return logp_NL + (off_N / batch.mask_NL.sum(1)).unsqueeze(1) * batch.mask_NL


def test_ppo_of_sequences_with_the_leave_one_out_mean_is_trls_rloo_where_it_clips_and_elsewhere():
    block = rollouts(groups=6, members=4, failed=())
    settings, advantage_N = rloo(block)
    generator_NL = generator(block, 0.5)
    loss, slope, notes = ours(block, settings, generator_NL)
    assert torch.allclose(notes.leave_one_out_N, advantage_N, atol=1e-5)
    agree((loss, slope), trl_rloo(block, generator_NL, advantage_N))


def test_the_gradient_of_reinforce_is_trls_on_samples_of_the_policy():
    block = rollouts(groups=6, members=4, failed=())
    _, advantage_N = rloo(block)
    settings = ObjectiveConfig(name="reinforce", advantage=Advantage.leave_one_out)
    _, theirs = trl_rloo(block, generator(block, 0.0), advantage_N)
    agree((0.0, ours(block, settings)[1]), (0.0, theirs))
