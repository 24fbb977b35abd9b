"""How a minibatch is cut into micro-batches: which rollouts go through the network together.

A rank's slice of the minibatch is fixed by the queue. With `learner.micro_tokens` = 0 it is cut in
order into pieces of `learner.micro_batch` rollouts. Else a micro-batch also costs at most so many
tokens in the forward pass (`learner.packing.cost`), padding included; its units, groups for
objectives that compare within one, else rollouts, are of similar length, the longest first. A unit
that is over the limit by itself goes alone. The loss is a sum with one divisor for the whole
minibatch, so that no cut changes it or its gradient.
"""

import numpy as np

from configs.objectives import TABLE
from configs.schema import Config
from learner.packing import cost, fed
from learner.replay.records import Index


def micro_batches(index: Index, config: Config, rank: int) -> list[np.ndarray]:
    """The rank's rollouts by micro-batch, as places in the minibatch [≤ M] int64.

    Equally many on every rank, which ZeRO-3's collectives rely on: they follow from the index of
    the whole minibatch, and where a rank has fewer, the last ones are empty.
    """
    ranks, members = config.learner.ranks, config.rollout.responses_per_prompt
    each = -(-config.groups_per_step // ranks) * members
    slices = [range(first, min(first + each, len(index.length_M)))
              for first in range(0, ranks * each, each)]  # fmt: skip
    if config.learner.micro_tokens:
        fed_M = np.where(index.valid_M, fed(index.prompt_M + index.length_M), 0)
        cuts = [_by_tokens(np.array(s, dtype=np.int64), fed_M, config) for s in slices]
    else:
        size = config.learner.micro_batch or each
        cuts = [[np.array(s[i : i + size]) for i in range(0, len(s), size)] for s in slices]
    most = max(map(len, cuts))
    empty = np.zeros(0, dtype=np.int64)
    return cuts[rank] + [empty] * (most - len(cuts[rank]))


def _by_tokens(slice_N: np.ndarray, fed_M: np.ndarray, config: Config) -> list[np.ndarray]:
    learner = config.learner
    pairwise = TABLE[config.objective.name].pairwise
    unit_UC = slice_N.reshape(-1, config.rollout.responses_per_prompt if pairwise else 1)
    longest_U = fed_M[unit_UC].max(1)
    unit_UC = unit_UC[np.argsort(-longest_U, kind="stable")]
    most = max(1, (learner.micro_batch or len(slice_N)) // unit_UC.shape[1])
    parts = []
    while len(unit_UC):
        count = _fitting(fed_M[unit_UC[:most]], learner.micro_tokens, learner.packing)
        parts.append(unit_UC[:count].ravel())
        unit_UC = unit_UC[count:]
    return parts


def _fitting(fed_UC: np.ndarray, limit: int, packing: bool) -> int:
    """How many of the first units cost no more than the limit, at least 1."""
    count = max(1, int((fed_UC.sum(1).cumsum() <= limit).sum()))
    while count > 1 and cost(fed_UC[:count].ravel(), packing) > limit:
        count -= 1
    return count
