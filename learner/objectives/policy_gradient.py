"""Objectives that weight log-probabilities by an advantage: PPO and REINFORCE.

Both are sums over rollouts (`Traits.per` = rollout). Without a value head the advantage Â of a
rollout, constant over its tokens, is by `objective.advantage`

- `standardised`: r̄, equation (19) of arXiv 2404.14367, over the round; or
- `leave_one_out`: r minus the mean reward of the other valid members of its group (RLOO: Kool et
  al. 2019; Ahmadian et al., arXiv 2402.14740, §2.3).
"""

import math

import torch
from torch import Tensor

from configs.schema import Advantage, ObjectiveConfig, Ratio
from learner.objectives.base import LossInputs, masked


def ppo(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Clipped policy gradient, with ρ against the policy that *generated* the sample.

        Σ_i −min(ρ_i·Â_i, clip(ρ_i, 1−ε, 1+ε)·Â_i)                             ratio=sequence
        Σ_i 1/|y_i| · Σ_t −min(ρ_it·Â_i, clip(ρ_it, 1−ε, 1+ε)·Â_i)             ratio=token

    ρ_i = π_θ(y_i)/π_gen(y_i), from log-probabilities summed over tokens (arXiv 2404.14367, I.2.4;
    what it prints as `max` inside −E is a sign slip), ρ_it the same of one token (Schulman et al.,
    arXiv 1707.06347, equation 7). The token form is a mean over a rollout's own tokens, so that
    both have one term per rollout and the same divisor.

    Reads logp, generator_logp [N, L] and the advantage [N]; returns a scalar. The minimum is
    written as a bound on log ρ, from above where Â ≥ 0 and from below elsewhere. It is the same
    number, and a ratio that overflows on the clipped side has gradient 0 and not 0 · ∞.
    """
    advantage_N = _advantage(x, s)
    log_ratio_NL = x.log_ratio_NL("generator_logp_NL")
    if s.ratio == Ratio.sequence:
        return -(advantage_N * _clipped_ratio(log_ratio_NL.sum(-1), advantage_N, s.epsilon)).sum()
    ratio_NL = _clipped_ratio(log_ratio_NL, advantage_N.unsqueeze(-1), s.epsilon)
    length_N = x.mask_NL.sum(-1).clamp(min=1)
    return -(advantage_N * masked(ratio_NL, x.mask_NL).sum(-1) / length_N).sum()


def reinforce(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Score-function gradient: Σ_i −log π_θ(y_i)·Â_i.

    Williams 1992; with Â = r̄ (arXiv 2404.14367, Table 1 and equation 19). No importance weight, so
    sound only on samples of the current policy: T = 1. Reads logp [N, L] and the advantage [N];
    returns a scalar.
    """
    return -(x.sequence_logp_N * _advantage(x, s)).sum()


def _advantage(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Â [N], 0 for failed members."""
    leave_one_out = s.advantage == Advantage.leave_one_out
    return masked(x.column("leave_one_out_N" if leave_one_out else "standardised_N"), x.valid_N)


def _clipped_ratio(log_ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """The ρ' with ρ'·Â = min(ρ·Â, clip(ρ, 1−ε, 1+ε)·Â), of any shape; 0 < ε < 1."""
    from_above = log_ratio.clamp(max=math.log1p(epsilon))
    from_below = log_ratio.clamp(min=math.log1p(-epsilon))
    return torch.where(advantage >= 0, from_above, from_below).exp()
