"""Advantages per token from a value head, and the head's loss. Pure functions of tensors.

Shapes: N rollouts, L response tokens. A mask is True on the first tokens of a row (right padding),
and nowhere in the row of a failed member; what stands where it is False, NaN included, is read by
nobody. V_t is the value of the prefix before token t, in units of the reward.
"""

import torch
from torch import Tensor

from learner.objectives.base import masked

VARIANCE_FLOOR = 1e-8


def token_rewards(reward_N: Tensor, log_ratio_NL: Tensor, kl: float, mask_NL: Tensor) -> Tensor:
    """r_t = −β·log π_gen(y_t)/π_ref(y_t), plus the response's reward at its last token, [N, L].

    kl: β. log_ratio_NL: log π_gen/π_ref, nats. Where the token limit cut a response off, its last
    token ends it as an end token would. Ziegler et al., arXiv 1909.08593, equation 2.
    """
    left_NL = mask_NL.flip(-1).cumsum(-1).flip(-1)
    last_NL = mask_NL & (left_NL == 1)
    penalty_NL = masked(-kl * log_ratio_NL, mask_NL) if kl else torch.zeros_like(log_ratio_NL)
    return penalty_NL + masked(reward_N.unsqueeze(-1).expand_as(last_NL), last_NL)


def gae(
    reward_NL: Tensor, value_NL: Tensor, mask_NL: Tensor, gamma: float, lam: float
) -> Tensor:  # fmt: skip
    """Generalised advantage estimation, [N, L], 0 where masked; after the last token V = 0.

        δ_t = r_t + γ·V_{t+1} − V_t        Â_t = δ_t + γλ·Â_{t+1}

    Schulman et al., arXiv 1506.02438, equation 16. The return that V_t is trained towards is
    Â_t + V_t (λ-return).
    """
    reward_NL, value_NL = masked(reward_NL, mask_NL), masked(value_NL, mask_NL)
    after_NL = torch.cat([value_NL[:, 1:], value_NL.new_zeros(len(value_NL), 1)], 1)
    delta_NL = reward_NL + gamma * after_NL - value_NL
    advantage_NL = torch.zeros_like(delta_NL)
    later_N = delta_NL.new_zeros(len(delta_NL))
    for t in reversed(range(delta_NL.shape[1])):
        later_N = delta_NL[:, t] + gamma * lam * later_N
        advantage_NL[:, t] = later_N
    return masked(advantage_NL, mask_NL)


def moments(value_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """Count, sum and sum of squares under the mask, [3] float64: those of several parts add up."""
    kept_NL = masked(value_NL.double(), mask_NL)
    return torch.stack([mask_NL.sum().double(), kept_NL.sum(), kept_NL.square().sum()])


def whitened(value_NL: Tensor, mask_NL: Tensor, moments_3: Tensor) -> Tensor:
    """(x − mean)/√(variance + 10⁻⁸) under the mask, 0 elsewhere; variance with n − 1.

    moments_3: of all the tokens that are whitened together, from `moments`. A single token, or
    equal ones, become 0.
    """
    count, total, squares = moments_3.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    scaled_NL = (value_NL.double() - mean) * (variance + VARIANCE_FLOOR).rsqrt()
    return masked(scaled_NL, mask_NL).to(value_NL.dtype)


def value_losses(
    value_NL: Tensor, first_value_NL: Tensor, return_NL: Tensor, mask_NL: Tensor, epsilon: float
) -> Tensor:
    """The clipped value loss of each rollout, a mean over its tokens, [N]; 0 without tokens.

        1/|y| · Σ_t ½·max((V_t − R_t)², (clip(V_t, V⁰_t − ε, V⁰_t + ε) − R_t)²)

    V⁰ is the value at first use. The maximum takes the gradient from a value that has already moved
    towards its return by more than ε. After Schulman et al., arXiv 1707.06347, as in OpenAI's
    baselines and TRL's former PPO trainer.
    """
    value_NL, return_NL = masked(value_NL, mask_NL), masked(return_NL, mask_NL)
    first_NL = masked(first_value_NL, mask_NL)
    near_NL = torch.clamp(value_NL, first_NL - epsilon, first_NL + epsilon)
    worse_NL = torch.maximum((value_NL - return_NL).square(), (near_NL - return_NL).square())
    return 0.5 * worse_NL.sum(-1) / mask_NL.sum(-1).clamp(min=1)
