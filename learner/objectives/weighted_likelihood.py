"""Objectives that raise the likelihood of some responses: (weighted) maximum likelihood.

Each reads logp [N, L] and one column [N] that says which responses count and how much, and returns
a scalar: the sum over what `Traits.per` names. log π_θ(y) is summed over a response's tokens.
"""

from torch import Tensor

from configs.choices import RewardScale
from configs.schema import ObjectiveConfig
from learner.objectives.base import LossInputs, masked, pair_masks


def rwr(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Reward-weighted regression: Σ_i −log π_θ(y_i)·exp(r_i/β).

    Peters and Schaal, ICML 2007; arXiv 2404.14367, Table 1 and Appendix I (bandit: raw reward,
    β = 0.1). r is the raw reward or r̄ of equation (19), by `objective.reward`. Per rollout.
    """
    standardised = s.reward == RewardScale.standardised
    reward_N = masked(x.column("standardised_N" if standardised else "reward_N"), x.valid_N)
    return -(x.sequence_logp_N * (reward_N / s.beta).exp()).sum()


def best_of_n(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Likelihood of each group's best response: Σ_g −log π_θ(y_best).

    arXiv 2404.14367, Table 1 and Appendix I. Per group.
    """
    return _nll(x, x.column("best_N"))


def best_of_n_negative(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Best-of-N that also pushes the others down: Σ_g −log π_θ(y_best) + β·Σ_other log π_θ(y).

    arXiv 2404.14367, Appendix F and I. Minimising log π has no lower bound, so a response is pushed
    only while it is still above a threshold: its mean log-probability per token must exceed
    `objective.floor` (nats per token; the gate itself has no gradient). The others are the group's
    valid members with a score. Per group.
    """
    others_N = x.valid_N & ~x.column("best_N") & ~x.column("score_N").isnan()
    length_N = x.mask_NL.sum(-1).clamp(min=1)
    above_N = x.sequence_logp_N.detach() > s.floor * length_N
    return best_of_n(x, s) + s.beta * masked(x.sequence_logp_N, others_N & above_N).sum()


def rest(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Reinforced self-training: Σ −log π_θ(y) over the responses above a quantile of the rewards.

    Gulcehre et al., arXiv 2308.08998, §3 (the NLL form of its filtered loss); arXiv 2404.14367,
    Table 1. The quantile is the round's and rises as training goes (`learner.signals`). Per
    selected rollout.
    """
    return _nll(x, x.column("selected_N"))


def pref_ft(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Likelihood of the preferred response of each pair: Σ_{(w, l)} −log π_θ(y_w).

    arXiv 2404.14367, Table 1 and Appendix F. A response counts once for each pair that it wins. Per
    pair.
    """
    wins_GCC = pair_masks(x.column("score_N"), x.valid_N, x.members)
    return -(x.sequence_logp_N * wins_GCC.sum(-1).flatten()).sum()


def binary_feedme(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Likelihood of the responses labelled good: Σ_good −log π_θ(y).

    arXiv 2404.14367, Table 1 and Appendix F; the name is that of Dubois et al., arXiv 2305.14387.
    Per good rollout.
    """
    return _nll(x, x.column("good_N"))


def _nll(x: LossInputs, chosen_N: Tensor) -> Tensor:
    """Σ −log π_θ(y) over the chosen responses, a scalar; a failed one has log-probability 0."""
    return -masked(x.sequence_logp_N, chosen_N).sum()
