"""Objectives that weight log-probabilities by an advantage: PPO and REINFORCE.

Both are sums over rollouts (`Traits.per` = rollout). The advantage Â is by `objective.advantage`

- `standardised`: r̄, equation (19) of arXiv 2404.14367, over the round; or
- `leave_one_out`: r minus the mean reward of the other valid members of its group (RLOO: Kool et
  al. 2019; Ahmadian et al., arXiv 2402.14740, §2.3), both constant over a rollout's tokens; or
- `gae`: Â_it of each token, from a value head (`learner.objectives.gae`); it takes Â_i's place in
  PPO's token form, and in REINFORCE inside the sum over tokens.

Off-policy correction. Weights π/π_gen are constants (no gradient) and, with `objective.
importance_cap` = c, truncated: min(π/π_gen, c) (Ionides 2008, "Truncated Importance Sampling").
With `objective.mask_ratio` = r, a sequence contributes 0 while the geometric mean of its tokens'
ratios, exp(1/|y| · Σ_t log π_θ/π_gen), is outside [1/r, r]: a mean, so that r means the same at
every length (the ratio is that of GSPO, Zheng et al., arXiv 2507.18071; masking by it, for Â < 0
and one side only, is in DeepSeek-V3.2, arXiv 2512.02556). It still counts in the divisor.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from configs.choices import Advantage, Importance, Proximal, Ratio
from configs.schema import ObjectiveConfig
from learner.divergence import within
from learner.objectives.base import LossInputs, masked


def ppo(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Clipped policy gradient, with ρ against the policy that *generated* the sample.

        Σ_i −min(ρ_i·Â_i, clip(ρ_i, 1−ε, 1+ε)·Â_i)                             ratio=sequence
        Σ_i 1/|y_i| · Σ_t −min(ρ_it·Â_i, clip(ρ_it, 1−ε, 1+ε)·Â_i)             ratio=token

    ρ_i = π_θ(y_i)/π_gen(y_i), from log-probabilities summed over tokens (arXiv 2404.14367, I.2.4;
    what it prints as `max` inside −E is a sign slip), ρ_it the same of one token (Schulman et al.,
    arXiv 1707.06347, equation 7). The token form is a mean over a rollout's own tokens, so that
    both have one term per rollout and the same divisor.

    With proximal=first_use it is decoupled: ρ' = π_θ/π_prox, with π_prox the policy that first
    consumed the sample, takes ρ's place, and each term is weighted back to π_gen, per sequence or
    token as `ratio` says (Hilton et al., arXiv 2110.00641, §3; Fu et al., arXiv 2505.24298; capped
    as in the module's docstring):

        −π_prox/π_gen · min(ρ'·Â, clip(ρ', 1−ε, 1+ε)·Â)

    So the trust region is about a recent policy, however old the sample; and a first pass never
    clips. Reads logp, generator_logp (decoupled: proximal_logp too) [N, L] and the advantage [N];
    returns a scalar. The minimum is written as a bound on log ρ, from above where Â ≥ 0 and from
    below elsewhere. It is the same number, and a ratio that overflows on the clipped side has
    gradient 0 and not 0 · ∞.
    """
    x = _within_mask_ratio(x, s)
    advantage_NL = _advantage(x, s)
    decoupled = s.proximal == Proximal.first_use
    proximal = "proximal_logp_NL" if decoupled else "generator_logp_NL"
    log_ratio_NL = x.log_ratio_NL(proximal)
    per = Importance(s.ratio.value) if decoupled else Importance.none
    weight_NL = _weight(x, s, proximal, per)
    if s.ratio == Ratio.sequence:
        advantage_N = advantage_NL.squeeze(-1)
        ratio_N = _clipped_ratio(log_ratio_NL.sum(-1), advantage_N, s.epsilon)
        return -(advantage_N * weight_NL.squeeze(-1) * ratio_N).sum()
    ratio_NL = weight_NL * _clipped_ratio(log_ratio_NL, advantage_NL, s.epsilon)
    length_N = x.mask_NL.sum(-1).clamp(min=1)
    return -((advantage_NL * masked(ratio_NL, x.mask_NL)).sum(-1) / length_N).sum()


def reinforce(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Score-function gradient, weighted by how far the sample is off-policy.

        Σ_i −log π_θ(y_i)·Â_i                                                  importance=none
        Σ_i −sg[π_θ(y_i)/π_gen(y_i)]·log π_θ(y_i)·Â_i                          importance=sequence
        Σ_i Σ_t −sg[π_θ(y_it)/π_gen(y_it)]·log π_θ(y_it)·Â_i                   importance=token

    Williams 1992; with Â = r̄ (arXiv 2404.14367, Table 1 and equation 19). Unweighted it is sound
    only on samples of the current policy: T = 1. sg: a constant, capped as in the module's
    docstring. Uncapped, `sequence` is the exact weight; `token` leaves out the prefix's ratio, some
    bias for much less variance (as CISPO's, arXiv 2506.13585, and V-trace's truncated ρ, Espeholt
    et al., arXiv 1802.01561). Reads logp (weighted: generator_logp too) [N, L] and the advantage
    [N]; returns a scalar.
    """
    x = _within_mask_ratio(x, s)
    weight_NL = _weight(x, s, "logp_NL", s.importance)
    return -(weight_NL * masked(x.logp_NL, x.mask_NL) * _advantage(x, s)).sum()


def _advantage(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Â, 0 for failed members: [N, L] by GAE, else [N, 1]."""
    if s.advantage == Advantage.gae:
        return masked(x.column("advantage_NL"), x.mask_NL)
    leave_one_out = s.advantage == Advantage.leave_one_out
    advantage_N = x.column("leave_one_out_N" if leave_one_out else "standardised_N")
    return masked(advantage_N, x.valid_N).unsqueeze(-1)


def _weight(x: LossInputs, s: ObjectiveConfig, of: str, per: Importance) -> Tensor:
    """sg[min(π/π_gen, cap)], π by its column: [N, L] per token, else [N, 1]; 1 for none."""
    if per == Importance.none:
        return torch.ones_like(x.logp_NL[:, :1])
    log_ratio_NL = x.log_ratio_NL("generator_logp_NL", of).detach()
    if per == Importance.sequence:
        log_ratio_NL = log_ratio_NL.sum(-1, keepdim=True)
    if s.importance_cap is not None:
        log_ratio_NL = log_ratio_NL.clamp(max=math.log(s.importance_cap))
    return log_ratio_NL.exp()


def _within_mask_ratio(x: LossInputs, s: ObjectiveConfig) -> LossInputs:
    """The same with sequences beyond `objective.mask_ratio` masked as failed members are."""
    if s.mask_ratio is None:
        return x
    generator_NL = x.column("generator_logp_NL")
    kept_N = x.valid_N & within(x.logp_NL, generator_NL, x.mask_NL, s.mask_ratio)
    return replace(x, valid_N=kept_N, mask_NL=x.mask_NL & kept_N.unsqueeze(-1))


def _clipped_ratio(log_ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """The ρ' with ρ'·Â = min(ρ·Â, clip(ρ, 1−ε, 1+ε)·Â), of any shape; 0 < ε < 1."""
    from_above = log_ratio.clamp(max=math.log1p(epsilon))
    from_below = log_ratio.clamp(min=math.log1p(-epsilon))
    return torch.where(advantage >= 0, from_above, from_below).exp()
