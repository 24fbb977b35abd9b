"""What an objective is given, and the small tensor functions that several of them share.

An objective is a pure function `(LossInputs, ObjectiveConfig) -> Tensor`: the *sum* of its terms
over a micro-batch. The learner divides by the count (`Traits.per`) over the whole minibatch of all
ranks, so that accumulation, failed members and ranks never change a term's weight.
Shapes: N rollouts of the micro-batch = G groups of C consecutive members, L response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossInputs:
    """A micro-batch as losses see it. All but `logp_NL` and `value_NL` is constant (no gradient).

    Padding and failed members have False in the masks; what stands in their other columns, NaN
    included, reaches neither the loss nor its gradient. A column that the objective's `Traits` do
    not ask for may be None.
    """

    logp_NL: Tensor  # log π_θ of the sampled tokens, nats
    mask_NL: Tensor  # bool, response tokens of valid rollouts
    valid_N: Tensor  # bool
    members: int  # C; group of rollout i is i // C where groups are whole
    generator_logp_NL: Tensor | None = None  # log π_gen
    proximal_logp_NL: Tensor | None = None  # log π_prox: π_θ when it first consumed the rollout
    reference_logp_NL: Tensor | None = None  # log π_ref
    advantage_NL: Tensor | None = None  # per token, by GAE, whitened
    value_NL: Tensor | None = None  # V of the prefix before each token, of the weights in training
    first_value_NL: Tensor | None = None  # the same when they first consumed the rollout
    return_NL: Tensor | None = None  # what values are trained towards
    reward_N: Tensor | None = None  # raw reward
    standardised_N: Tensor | None = None  # r̄, equation (19), over the round
    leave_one_out_N: Tensor | None = None  # reward − mean reward of the other valid members
    best_N: Tensor | None = None  # bool, the group's best valid member (the first of equals)
    good_N: Tensor | None = None  # bool, labelled good
    selected_N: Tensor | None = None  # bool, over ReST's quantile of the round
    score_N: Tensor | None = None  # what pairs are ranked by: the reward, else the label
    wins_N: Tensor | None = None  # pairs of its group in which it is the winner
    losses_N: Tensor | None = None  # and the loser

    @property
    def sequence_logp_N(self) -> Tensor:
        """log π_θ(y), summed over the response's tokens, nats; 0 for a failed member."""
        return masked(self.logp_NL, self.mask_NL).sum(-1)

    def column(self, name: str) -> Tensor:
        """The optional column of that name; ValueError where the micro-batch lacks it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this objective reads {name}, which the micro-batch does not carry")
        return value

    def log_ratio_NL(self, name: str, of: str = "logp_NL") -> Tensor:
        """log π_θ, or column `of`, − the log-probability column of that name, nats per token, 0
        where masked."""
        return masked(self.column(of) - self.column(name), self.mask_NL)


def pair_masks(score_N: Tensor, valid_N: Tensor, members: int) -> Tensor:
    """All pairs i ≠ j of a group with score_i > score_j, both valid: bool [G, C, C].

    A NaN score compares with nothing: a member without a score is in no pair.
    """
    score_GC, valid_GC = score_N.view(-1, members), valid_N.view(-1, members)
    both_GCC = valid_GC.unsqueeze(2) & valid_GC.unsqueeze(1)
    return both_GCC & (score_GC.unsqueeze(2) > score_GC.unsqueeze(1))


def masked(value: Tensor, mask: Tensor) -> Tensor:
    """The value where the mask holds, 0 elsewhere, without letting NaN through.

    Apply it before a nonlinearity, not after: the gradient of what was masked out is 0 times the
    nonlinearity's slope, and 0 · ∞ is NaN.
    """
    return torch.where(mask, value, value.new_zeros(()))
