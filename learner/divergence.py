"""How far policies are apart: which divergence, over what, estimated how. All in nats.

Three policies: π_θ (being trained), π_gen (it generated the samples), π_ref (frozen). Samples and
prefixes are always π_gen's, and ρ_t = π_θ(y_t|y_<t)/π_gen(y_t|y_<t). Two families of numbers:

- *per token*, [N, L]: the divergence of next-token distributions at the prefixes that π_gen visits,
  one entry per sampled token;
- *per sequence*, [N]: the divergence of distributions over whole responses.

Entries where the mask is False are 0, also where NaN stands beneath it, so that callers may sum any
cell and divide by its count of tokens or rollouts. The expectation over π_gen's samples is what
equals the divergence; a single entry does not. Estimators from samples work in float64: a ratio of
float32 overflows from 89 nats on. Every estimator with a factor ρ supposes that π_θ puts no mass
where π_gen has none (same temperature and support, law 4). Not for gradients.
"""

import math

import torch
from torch import Tensor

from learner.objectives.base import masked


def exact_kl(logp_NLV: Tensor, logq_NLV: Tensor, mask_NL: Tensor) -> Tensor:
    """KL(p‖q) = Σ_v p(v)·log(p(v)/q(v)) at each prefix, exact, per token [N, L], nats.

    Takes full log-distributions over V tokens. The expectation is under the *first* argument:
    `exact_kl(θ, gen)` is KL(π_θ‖π_gen), `exact_kl(gen, θ)` is KL(π_gen‖π_θ). A token that p gives
    no mass adds 0; one that only q gives none makes it ∞.
    """
    kl_NL = torch.linalg.vecdot(logp_NLV.exp(), logp_NLV - logq_NLV)
    if bool(torch.isnan(kl_NL).any()):  # tokens without mass, at 0·(−∞), or NaN beneath the mask
        supported_NLV = (logp_NLV > -torch.inf) & mask_NL.unsqueeze(-1)
        return masked(logp_NLV.exp() * (logp_NLV - logq_NLV), supported_NLV).sum(-1)
    return masked(kl_NL, mask_NL)


def kl_from_generator(logp_NL: Tensor, generator_logp_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """KL(π_gen‖π_θ), per token on π_gen's prefixes [N, L], by k3: ρ − 1 − log ρ ≥ 0.

    Unbiased under π_gen, since E_gen[ρ] = 1 (Schulman, "Approximating KL Divergence", 2020). For
    where conditionals are unknown; else `exact_kl(gen, θ)`.
    """
    log_ratio_NL = _log_ratio(logp_NL, generator_logp_NL, mask_NL)
    return log_ratio_NL.expm1() - log_ratio_NL


def kl_to_generator(logp_NL: Tensor, generator_logp_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """KL(π_θ‖π_gen), the paper's direction, per token on π_gen's prefixes [N, L]: ρ·log ρ − ρ + 1.

    Nonnegative. Unbiased under π_gen: E_gen[ρ·log ρ] = E_θ[log ρ] and E_gen[ρ] = 1. Prefixes are
    not reweighted here; see `sequence_kl_to`.
    """
    log_ratio_NL = _log_ratio(logp_NL, generator_logp_NL, mask_NL)
    return log_ratio_NL.exp() * log_ratio_NL - log_ratio_NL.expm1()


def kl_to_reference(
    logp_NL: Tensor, generator_logp_NL: Tensor, reference_logp_NL: Tensor, mask_NL: Tensor
) -> Tensor:
    """KL(π_θ‖π_ref), per token on π_gen's prefixes [N, L]: ρ·(log(π_θ/π_ref) − 1 + π_ref/π_θ).

    The k3 form of KL(π_θ‖π_ref) under π_θ, importance-weighted to π_gen's samples: the bracket is
    x − 1 − log x ≥ 0 at x = π_ref/π_θ, and E_gen[ρ·f] = E_θ[f], where E_θ[x] = 1. So it is
    unbiased and never negative; where π_gen = π_θ, it is plain k3.
    """
    log_ratio_NL = _log_ratio(logp_NL, generator_logp_NL, mask_NL)
    to_reference_NL = _log_ratio(logp_NL, reference_logp_NL, mask_NL)
    return log_ratio_NL.exp() * ((-to_reference_NL).expm1() + to_reference_NL)


def prefix_weights(logp_NL: Tensor, generator_logp_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """w_<t = ∏_{i<t} ρ_i, [N, L]: the importance of π_gen's prefix under π_θ; 0 where masked."""
    log_ratio_NL = _log_ratio(logp_NL, generator_logp_NL, mask_NL)
    return masked((log_ratio_NL.cumsum(-1) - log_ratio_NL).exp(), mask_NL)


def sequence_kl_to(kl_NL: Tensor, prefix_weight_NL: Tensor) -> Tensor:
    """KL(π_θ‖π_gen) per sequence [N], or KL(π_θ‖π_ref): Σ_t w_<t·kl_t, on π_gen's samples.

    By the chain rule the divergence of whole responses is E_θ[Σ_t KL_t at the prefix y_<t]; the
    weights carry that expectation over π_θ's prefixes to π_gen's. kl_NL: per-token terms of
    KL(π_θ‖·), either `exact_kl(θ, ·)` (less variance) or the sampled `kl_to_generator` or
    `kl_to_reference`. Unbiased in both cases; its trustworthiness is what `ess` says.
    """
    return (prefix_weight_NL * kl_NL).sum(-1)


def sequence_kl_from_generator(kl_NL: Tensor) -> Tensor:
    """KL(π_gen‖π_θ) per sequence [N]: Σ_t kl_t. π_gen's own prefixes need no weights.

    kl_NL: per-token terms of KL(π_gen‖π_θ), `exact_kl(gen, θ)` or `kl_from_generator`.
    """
    return kl_NL.sum(-1)


def ess(log_ratio_N: Tensor, valid_N: Tensor) -> Tensor:
    """Effective sample size of importance weights ρ: (Σρ)²/(n·Σρ²), a fraction of n, scalar.

    log_ratio_N: log ρ of n valid samples, per sequence (summed over tokens) or per token. In 1/n …
    1, and 1 if all weights are equal; NaN if n = 0. Kong 1992. Unmoved by a common factor of ρ, and
    computed in logarithms, so that it never overflows.
    """
    log_ratio_N = log_ratio_N.double().masked_fill(~valid_N, -torch.inf)
    log_sum, log_sum_squares = log_ratio_N.logsumexp(-1), (2 * log_ratio_N).logsumexp(-1)
    return (2 * log_sum - log_sum_squares).exp() / valid_N.sum()


def clipped(log_ratio: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """1 where ρ lies outside [1−ε, 1+ε], else 0; its mean over the mask is `clip_fraction`.

    Any shape: ρ of sequences [N] or of tokens [N, L]. Counts every ratio out of PPO's range,
    whatever the sign of the advantage, so that it is defined for every objective.
    """
    return (((log_ratio.exp() - 1).abs() > epsilon) & mask).double()


def within(
    logp_NL: Tensor, generator_logp_NL: Tensor, mask_NL: Tensor, ratio: float
) -> Tensor:  # fmt: skip
    """Sequences whose ratio π_θ/π_gen, as the geometric mean over tokens, is between 1/ratio and
    ratio; bool [N]."""
    length_N = mask_NL.sum(-1).clamp(min=1)
    mean_N = _log_ratio(logp_NL, generator_logp_NL, mask_NL).detach().sum(-1) / length_N
    return mean_N.abs() <= math.log(ratio)


def _log_ratio(logp_NL: Tensor, logq_NL: Tensor, mask_NL: Tensor) -> Tensor:
    return masked(logp_NL.double() - logq_NL.double(), mask_NL)
