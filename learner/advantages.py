"""GAE at a rollout's first consumption, kept for its later ones.

Values, returns and advantages are derived columns: they go back to the queue with the commit and
come again with the rollout, so that all T passes see the same advantages, made with the β and the
values of the first. Whitening is over the valid tokens of the minibatch that consumes the rollouts
first, of all ranks together (their moments are added up), so that it does not depend on how many
ranks or micro-batches there are.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, distributed, nn

from configs.schema import Config
from learner.batch import Padded
from learner.objectives.base import LossInputs
from learner.objectives.gae import gae, moments, token_rewards, whitened
from learner.packing import logps_and_values

ADVANTAGE, VALUE, RETURN = "advantage_K", "value_K", "return_K"
COLUMNS = (ADVANTAGE, VALUE, RETURN)


def with_values(inputs: LossInputs, value_NL: Tensor, part: Padded) -> LossInputs:
    """A micro-batch's inputs with its values, and what was derived at first use."""
    return replace(
        inputs,
        value_NL=value_NL,
        advantage_NL=part.derived_NL[ADVANTAGE],
        first_value_NL=part.derived_NL[VALUE],
        return_NL=part.derived_NL[RETURN],
    )


@torch.no_grad()
def derive(
    network: nn.Module,
    parts: list[Padded | None],
    rewards: list[Tensor],
    reference: Callable[[Padded], Tensor],
    config: Config,
    kl: float,
) -> list[dict[str, Tensor]]:
    """`COLUMNS` of each micro-batch, [N, L] each; all ranks must call it together.

    network: DeepSpeed's engine of a policy with a value head. parts: equally many on every rank,
    None where one has nothing. rewards: [N] of each part. reference: log π_ref of a part's tokens,
    [N, L], asked for where `kl`, which is β, is not 0.
    """
    s, packing = config.objective.value, config.learner.packing
    device = next(network.parameters()).device
    network.eval()
    columns: list[dict[str, Tensor]] = []
    sums_3 = torch.zeros(3, dtype=torch.float64, device=device)
    for part, reward_N in zip(parts, rewards, strict=True):
        if part is None:
            network(torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
            columns.append({})
            continue
        value_NL = logps_and_values(network, part, packing)[1]
        assert value_NL is not None, "the network has no value head"
        log_ratio_NL = part.logp_NL - reference(part) if kl else torch.zeros_like(value_NL)
        reward_NL = token_rewards(reward_N, log_ratio_NL, kl, part.mask_NL)
        advantage_NL = gae(reward_NL, value_NL, part.mask_NL, s.gamma, s.lam)
        sums_3 += moments(advantage_NL, part.mask_NL)
        return_NL = advantage_NL + value_NL
        columns.append({ADVANTAGE: advantage_NL, VALUE: value_NL, RETURN: return_NL})
    network.train()
    if s.whiten:
        distributed.all_reduce(sums_3)
        for part, derived in zip(parts, columns):
            if part is not None:
                derived[ADVANTAGE] = whitened(derived[ADVANTAGE], part.mask_NL, sums_3)
    return columns
