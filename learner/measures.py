"""How on-policy a step was: KL, ESS, clip fraction and gradient weight, per (age, reuse) cell.

Everything is kept as sums (`learner.cells`), so that micro-batches, ranks and steps add up. A
number whose inputs are missing is absent, never 0.
"""

import numpy as np
import torch
from torch import Tensor

from configs.objectives import TABLE
from configs.schema import ObjectiveConfig
from learner import divergence
from learner.batch import distinct
from learner.cells import Cells
from learner.objectives.base import LossInputs, masked
from learner.objectives.terms import values_of


@torch.no_grad()
def measure(
    inputs: LossInputs,
    gradient_NL: Tensor,
    age_N: np.ndarray,
    reuse_N: np.ndarray,
    conditionals: tuple[Tensor | None, Tensor | None, Tensor | None],
    objective: ObjectiveConfig,
) -> Cells:
    """Sums over one micro-batch by (age, reuse).

    gradient_NL: ∂loss/∂log π_θ(token). conditionals: log-distributions [N, L, V] of π_θ, π_gen
    and π_ref where known; with π_θ's and another KL is exact at each prefix, else estimated from
    the sampled tokens. objective: whose clipping, masking and pairs are counted, if it has any.
    """
    valid_N, mask_NL = inputs.valid_N, inputs.mask_NL
    columns: dict[str, Tensor] = {
        "rollouts": valid_N.double(),
        "tokens": mask_NL.sum(-1).double(),
        "gradient_weight": gradient_NL.abs().double().sum(-1),
    }
    tokens = _per_token(inputs, conditionals)
    columns.update({name: value_NL.double().sum(-1) for name, value_NL in tokens.items()})
    if inputs.generator_logp_NL is not None:
        log_ratio_NL = torch.where(mask_NL, inputs.logp_NL - inputs.generator_logp_NL, 0.0)
        sampled_NL = divergence.kl_from_generator(inputs.logp_NL, inputs.generator_logp_NL, mask_NL)
        columns["sampled_kl_from_generator"] = sampled_NL.sum(-1)
        columns.update(_of_ratio(inputs, log_ratio_NL, tokens))
        columns.update(_of_objective(inputs, objective))
    if TABLE[objective.name].prefers and inputs.reference_logp_NL is not None:
        columns.update(_of_pairs(inputs))
    if inputs.value_NL is not None:
        columns.update(_of_values(inputs, objective))
    return _by_cell(columns, age_N, reuse_N, valid_N.cpu().numpy())


def _per_token(
    inputs: LossInputs, conditionals: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> dict[str, Tensor]:
    """Each divergence at each prefix, [N, L]: exact where distributions are known."""
    now_NLV, generator_NLV, reference_NLV = conditionals
    logp, gen, ref = inputs.logp_NL, inputs.generator_logp_NL, inputs.reference_logp_NL
    mask, out = inputs.mask_NL, {}
    if now_NLV is not None and generator_NLV is not None:
        out["kl_to_generator"] = divergence.exact_kl(now_NLV, generator_NLV, mask)
        out["kl_from_generator"] = divergence.exact_kl(generator_NLV, now_NLV, mask)
    elif gen is not None:
        out["kl_to_generator"] = divergence.kl_to_generator(logp, gen, mask)
        out["kl_from_generator"] = divergence.kl_from_generator(logp, gen, mask)
    if now_NLV is not None and reference_NLV is not None:
        out["kl_to_reference"] = divergence.exact_kl(now_NLV, reference_NLV, mask)
    elif gen is not None and ref is not None:
        out["kl_to_reference"] = divergence.kl_to_reference(logp, gen, ref, mask)
    return out


def _of_ratio(
    inputs: LossInputs, log_ratio_NL: Tensor, tokens: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Sequence divergences, and the sums that ESS is made of, all [N]."""
    assert inputs.generator_logp_NL is not None
    weight_NL = divergence.prefix_weights(inputs.logp_NL, inputs.generator_logp_NL, inputs.mask_NL)
    ratio_N = log_ratio_NL.double().sum(-1).exp() * inputs.valid_N
    to_NL, from_NL = tokens["kl_to_generator"], tokens["kl_from_generator"]
    return {
        "ratio": ratio_N,
        "ratio_squared": ratio_N**2,
        "kl_to_generator_sequence": divergence.sequence_kl_to(to_NL, weight_NL),
        "kl_from_generator_sequence": divergence.sequence_kl_from_generator(from_NL),
    }


def _of_objective(inputs: LossInputs, objective: ObjectiveConfig) -> dict[str, Tensor]:
    """Ratios that PPO clips, sequences that `mask_ratio` masks, and how many there are, [N]."""
    out = {}
    if objective.name == "ppo":
        out = _of_clip(inputs, objective.ratio.value, objective.epsilon)
    if objective.mask_ratio is not None:
        assert inputs.generator_logp_NL is not None
        within_N = divergence.within(
            inputs.logp_NL, inputs.generator_logp_NL, inputs.mask_NL, objective.mask_ratio
        )
        out["masked"] = (inputs.valid_N & ~within_N).double()
    return out


def _of_pairs(inputs: LossInputs) -> dict[str, Tensor]:
    """log π_θ/π_ref of each rollout as the winner and as the loser of its pairs, and how many
    pairs those are, [N]: the implicit reward over β (Rafailov et al., arXiv 2305.18290)."""
    margin_N = inputs.log_ratio_NL("reference_logp_NL").double().sum(-1)
    won_N, lost_N = inputs.column("wins_N").double(), inputs.column("losses_N").double()
    return {
        "won": won_N, "won_log_ratio": won_N * margin_N,
        "lost": lost_N, "lost_log_ratio": lost_N * margin_N,
    }  # fmt: skip


def _of_values(inputs: LossInputs, objective: ObjectiveConfig) -> dict[str, Tensor]:
    """The value loss, and what the explained variance of returns is made of, [N]."""
    return_NL = masked(inputs.column("return_NL"), inputs.mask_NL).double()
    error_NL = return_NL - masked(inputs.column("value_NL"), inputs.mask_NL).double()
    return {
        "value_loss": values_of(inputs, objective).double(),
        "return": return_NL.sum(-1), "return_squared": return_NL.square().sum(-1),
        "value_error": error_NL.sum(-1), "value_error_squared": error_NL.square().sum(-1),
    }  # fmt: skip


def _of_clip(inputs: LossInputs, ratio: str, epsilon: float) -> dict[str, Tensor]:
    """Ratios that PPO clips, and how many there are, [N]: to π_prox where the loss has one."""
    against = "generator" if inputs.proximal_logp_NL is None else "proximal"
    log_ratio_NL = inputs.log_ratio_NL(f"{against}_logp_NL")
    if ratio == "token":
        clipped_N = divergence.clipped(log_ratio_NL, inputs.mask_NL, epsilon).sum(-1)
        return {"clipped": clipped_N, "clippable": inputs.mask_NL.double().sum(-1)}
    clipped_N = divergence.clipped(log_ratio_NL.sum(-1), inputs.valid_N, epsilon)
    return {"clipped": clipped_N, "clippable": inputs.valid_N.double()}


def _by_cell(
    columns: dict[str, Tensor], age_N: np.ndarray, reuse_N: np.ndarray, valid_N: np.ndarray
) -> Cells:
    names = list(columns)
    table = torch.stack([columns[name] for name in names]).cpu().numpy()
    pairs_P2, owner_N = distinct(age_N[valid_N], reuse_N[valid_N])
    sums = np.zeros((len(names), len(pairs_P2)))
    for row, values in enumerate(table[:, valid_N]):
        sums[row] = np.bincount(owner_N, weights=values, minlength=len(pairs_P2))
    return {
        (age, reuse): dict(zip(names, sums[:, cell].tolist()))
        for cell, (age, reuse) in enumerate(pairs_P2.tolist())
    }
