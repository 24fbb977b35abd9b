"""Objectives on pairs: the margin by which the policy prefers the winner more than π_ref does.

    margin(w, l) = log π_θ(y_w)/π_ref(y_w) − log π_θ(y_l)/π_ref(y_l)        nats, summed over tokens

Pairs are all i ≠ j of a group with score_i > score_j, both valid. Both losses read logp and
reference_logp [N, L] and score [N], sum over pairs (`Traits.per` = pair), and return a scalar.
"""

import torch.nn.functional as F
from torch import Tensor

from configs.schema import ObjectiveConfig
from learner.objectives.base import LossInputs, masked, pair_masks


def dpo(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Direct preference optimisation: Σ_{(w, l)} −log σ(β·margin).

    Rafailov et al., arXiv 2305.18290, equation 7; arXiv 2404.14367, Table 1.
    """
    margin_GCC, pair_GCC = _margins(x)
    return -masked(F.logsigmoid(s.beta * margin_GCC), pair_GCC).sum()


def ipo(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """Identity preference optimisation: Σ_{(w, l)} (margin − 1/(2τ))².

    Azar et al., arXiv 2310.12036, equation 17; arXiv 2404.14367, equation 20. The margin is a sum
    over tokens, not a mean. A margin over the target has a gradient too, back towards it.
    """
    margin_GCC, pair_GCC = _margins(x)
    return masked((margin_GCC - 0.5 / s.tau).square(), pair_GCC).sum()


def _margins(x: LossInputs) -> tuple[Tensor, Tensor]:
    """Margin of member i over member j [G, C, C], nats, and the mask of pairs that i wins."""
    log_ratio_GC = x.log_ratio_NL("reference_logp_NL").sum(-1).view(-1, x.members)
    margin_GCC = log_ratio_GC.unsqueeze(2) - log_ratio_GC.unsqueeze(1)
    return margin_GCC, pair_masks(x.column("score_N"), x.valid_N, x.members)
