"""What a minibatch's rewards and labels say about each rollout, computed once for all ranks.

Objectives read these columns, the learner divides by their counts. Everything comes from small
columns over the whole minibatch and the round's rewards, so that every rank has the same numbers
however the minibatch is cut. Shapes: M rollouts = G groups of C consecutive members; after `take`,
N of them.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from actors.rollout import UNLABELLED
from configs.schema import ObjectiveConfig
from learner.batch import is_all
from learner.objectives.base import LossInputs, pair_masks


@dataclass(frozen=True)
class Signals:
    """Columns over the rollouts of a minibatch, float32 or bool. NaN: there is no such number."""

    members: int  # C
    valid_N: Tensor  # bool
    reward_N: Tensor  # raw; NaN where absent (offline) or failed
    standardised_N: Tensor  # r̄, equation (19) of arXiv 2404.14367; NaN where the reward is
    leave_one_out_N: Tensor  # r − mean of the group's other known rewards; 0 without others
    score_N: Tensor  # what members are ranked by: the reward, else the label, else NaN
    best_N: Tensor  # bool, the valid member with the highest score, the first of equals
    good_N: Tensor  # bool, valid and labelled good
    selected_N: Tensor  # bool, valid and at or over ReST's quantile of the round
    wins_N: Tensor  # how many valid members of its group have a lower score
    losses_N: Tensor  # how many have a higher one

    def count(self, per: str) -> int:
        """How many terms the loss has, by `Traits.per`; 0 if, say, no pair differs in score.

        per: `rollout` (valid ones), `pair`, `group` (those with a best member), `selected` or
        `good`; KeyError for anything else.
        """
        if per == "pair":
            return int(self.wins_N.sum())
        column = {"rollout": "valid", "group": "best", "selected": "selected", "good": "good"}[per]
        return int(getattr(self, f"{column}_N").sum())

    def take(self, place_N: np.ndarray) -> "Signals":
        """The rollouts at these places, in this order; groups stay whole where the loss has any."""
        if is_all(place_N, len(self.valid_N)):
            return self
        return Signals(self.members, **{k: v[place_N] for k, v in self._columns().items()})

    def loss_inputs(
        self,
        logp_NL: Tensor,
        mask_NL: Tensor,
        generator_logp_NL: Tensor | None = None,
        reference_logp_NL: Tensor | None = None,
        proximal_logp_NL: Tensor | None = None,
    ) -> LossInputs:
        """These rollouts as an objective sees them, on the device of `logp_NL`.

        mask_NL: bool, response tokens; those of failed members are taken out here.
        """
        columns = {k: v.to(logp_NL.device) for k, v in self._columns().items()}
        return LossInputs(
            logp_NL=logp_NL,
            mask_NL=mask_NL & columns["valid_N"].unsqueeze(-1),
            members=self.members,
            generator_logp_NL=generator_logp_NL,
            reference_logp_NL=reference_logp_NL,
            proximal_logp_NL=proximal_logp_NL,
            **columns,
        )

    def _columns(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "members"}


def signals(
    reward_M: np.ndarray,
    label_M: np.ndarray,
    valid_M: np.ndarray,
    members: int,
    round_rewards: np.ndarray,
    objective: ObjectiveConfig,
    progress: float,
) -> Signals:
    """The signals of a minibatch, computed in float64 and handed out as float32.

    reward_M: NaN where absent or failed. label_M: 1 good, 0 not, −1 unlabelled. valid_M: bool.
    members: C. round_rewards: the rewards of the whole round that the minibatch is from, in any
    shape; NaN among them are left out. progress: how much of training is done, 0 … 1, for ReST's
    quantile. Raises ValueError unless M is a multiple of C.
    """
    if len(reward_M) % members:
        raise ValueError(f"{len(reward_M)} rollouts are not whole groups of {members}")
    valid_M = np.array(valid_M, dtype=bool)  # a copy: torch takes none that it may not write to
    label_M = np.asarray(label_M)
    reward_M = np.where(valid_M, np.asarray(reward_M, dtype=np.float64), np.nan)
    round_rewards = np.asarray(round_rewards, dtype=np.float64)
    round_rewards = round_rewards[~np.isnan(round_rewards)]
    score_M = _score(reward_M, label_M, valid_M, members)
    over_GCC = pair_masks(torch.from_numpy(score_M), torch.from_numpy(valid_M), members).numpy()
    columns = {
        "valid_N": valid_M,
        "reward_N": reward_M,
        "standardised_N": standardise(reward_M, round_rewards),
        "leave_one_out_N": _leave_one_out(reward_M, members),
        "score_N": score_M,
        "best_N": _best(score_M, members),
        "good_N": valid_M & (label_M == 1),
        "selected_N": _selected(reward_M, round_rewards, objective, progress),
        "wins_N": over_GCC.sum(2).ravel(),
        "losses_N": over_GCC.sum(1).ravel(),
    }
    return Signals(members, **{name: _tensor(column) for name, column in columns.items()})


def standardise(reward_M: np.ndarray, round_rewards: np.ndarray) -> np.ndarray:
    """r̄ = (r − mean)/σ, σ with n − 1, of the round's n known rewards; float64 [M].

    arXiv 2404.14367, equation (19). Where σ = 0 or n = 1 it is 0: equal rewards say nothing. (σ = 0
    is read from their range: a mean of equal numbers may be off by a rounding, and σ with it.)
    """
    if len(round_rewards) < 2 or np.ptp(round_rewards) == 0:
        return np.where(np.isnan(reward_M), np.nan, 0.0)
    return (reward_M - round_rewards.mean()) / round_rewards.std(ddof=1)


def _leave_one_out(reward_M: np.ndarray, members: int) -> np.ndarray:
    reward_GC = reward_M.reshape(-1, members)
    others_GC = (~np.isnan(reward_GC)).sum(1, keepdims=True) - 1
    mean_GC = (np.nansum(reward_GC, 1, keepdims=True) - reward_GC) / np.maximum(others_GC, 1)
    return np.where(others_GC == 0, reward_GC * 0.0, reward_GC - mean_GC).ravel()


def _score(
    reward_M: np.ndarray, label_M: np.ndarray, valid_M: np.ndarray, members: int
) -> np.ndarray:
    """By group: its rewards if every valid member has one, else its labels; never a mixture."""
    missing_GC = (valid_M & np.isnan(reward_M)).reshape(-1, members)
    labelled_M = valid_M & (label_M != UNLABELLED)
    by_label_M = np.where(labelled_M, label_M.astype(np.float64), np.nan)
    return np.where(np.repeat(missing_GC.any(1), members), by_label_M, reward_M)


def _best(score_M: np.ndarray, members: int) -> np.ndarray:
    score_GC = np.where(np.isnan(score_M), -np.inf, score_M).reshape(-1, members)
    best_GC = np.arange(members) == score_GC.argmax(1)[:, None]
    return best_GC.ravel() & ~np.isnan(score_M)


def _selected(
    reward_M: np.ndarray, round_rewards: np.ndarray, objective: ObjectiveConfig, progress: float
) -> np.ndarray:
    if not len(round_rewards):
        return np.zeros(len(reward_M), dtype=bool)
    start, end = objective.quantile_start, objective.quantile_end
    return reward_M >= np.quantile(round_rewards, start + (end - start) * progress)


def _tensor(column_M: np.ndarray) -> Tensor:
    return torch.from_numpy(column_M.astype(bool if column_M.dtype == bool else np.float32))
