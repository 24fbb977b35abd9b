"""β of the KL penalty in the reward, fixed or steered towards a target."""

import math

import torch
from torch import distributed

from configs.schema import ObjectiveConfig
from learner.cells import Cells, total


def adapted(beta: float, kl: float, target: float, rollouts: float, horizon: float) -> float:
    """β·(1 + clip(KL/target − 1, −0.2, 0.2)·n/horizon).

    kl, target: nats per response; rollouts: n, since the last time; horizon: rollouts. Ziegler et
    al., arXiv 1909.08593, §2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * rollouts / horizon)


class KlController:
    """β as it stands. The same on all ranks, part of a checkpoint, and so undone with its steps.

    It adapts after each committed step on fresh rollouts (first passes): n counts each rollout
    once, and KL(π_θ‖π_ref) is of samples as new as there are. A skipped step changes nothing.
    """

    def __init__(self, settings: ObjectiveConfig) -> None:
        self.settings = settings
        self.coefficient = settings.kl_reward

    def stepped(self, cells: Cells, device: torch.device) -> None:
        """A first pass was committed. cells: this rank's share of it; all ranks must call."""
        target = self.settings.kl_target
        if target is None:
            return
        sums = total(cells)
        parts = [sums.get("kl_to_reference", 0.0), sums.get("rollouts", 0.0)]
        both = torch.tensor(parts, dtype=torch.float64, device=device)
        distributed.all_reduce(both)
        nats, rollouts = both.tolist()
        if rollouts and math.isfinite(nats):
            kl, horizon = nats / rollouts, self.settings.kl_horizon
            self.coefficient = adapted(self.coefficient, kl, target, rollouts, horizon)
