"""The whole loss: an objective, and the terms that settings put beside it."""

from torch import Tensor

from configs.choices import Advantage
from configs.schema import ObjectiveConfig
from learner.objectives import Objective
from learner.objectives.base import LossInputs, masked
from learner.objectives.gae import value_losses


def whole_loss(
    objective: Objective, x: LossInputs, s: ObjectiveConfig, count: int, rollouts: int
) -> Tensor:
    """A micro-batch's share of the minibatch's loss, a scalar.

    The objective's terms over their `count`, plus, over the valid `rollouts` (both of the whole
    minibatch), `value.coefficient` times the value loss where there is a value head, and `kl_loss`
    times KL(π_θ‖π_ref).
    """
    loss = objective.loss(x, s) / max(count, 1)
    if s.advantage is Advantage.gae:
        loss = loss + s.value.coefficient * values_of(x, s).sum() / max(rollouts, 1)
    if s.kl_loss:
        loss = loss + s.kl_loss * reference_kl(x).sum() / max(rollouts, 1)
    return loss


def values_of(x: LossInputs, s: ObjectiveConfig) -> Tensor:
    """The value loss of each rollout, [N]; see `learner.objectives.gae.value_losses`."""
    return value_losses(
        x.column("value_NL"), x.column("first_value_NL"), x.column("return_NL"), x.mask_NL,
        s.value.epsilon,
    )  # fmt: skip


def reference_kl(x: LossInputs) -> Tensor:
    """KL(π_θ‖π_ref) of each rollout in nats per token, [N]: k3, weighted by ρ = π_θ/π_gen.

        1/|y| · Σ_t ρ_t·(x_t − 1 − log x_t),   x = π_ref/π_θ

    Unbiased on π_gen's samples at π_gen's prefixes (`learner.divergence.kl_to_reference`), and with
    ρ inside the gradient so is its gradient, ρ·log(π_θ/π_ref)·∇log π_θ. Without ρ (Shao et al.,
    arXiv 2402.03300, equation 4) it would be that of KL(π_ref‖π_θ) (DeepSeek-V3.2, arXiv
    2512.02556, §3.1). Written with ρ·x = π_ref/π_gen, which stays finite as π_θ → 0.
    """
    log_ratio_NL = x.log_ratio_NL("generator_logp_NL")
    to_reference_NL = x.log_ratio_NL("reference_logp_NL")
    kl_NL = (to_reference_NL - 1) * log_ratio_NL.exp() + (log_ratio_NL - to_reference_NL).exp()
    return masked(kl_NL, x.mask_NL).sum(-1) / x.mask_NL.sum(-1).clamp(min=1)
