"""What `benchmarks.queue` puts into every store: a lease's groups of rollouts, as `Rollouts`."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.rollout import GroupId, Rollouts, offsets

MEMBERS, PROMPT = 8, 16  # rollouts a group, tokens a prompt
VOCABULARY = 32_000


def block_of(groups: int, tokens: int, seed: int = 0) -> Rollouts:
    """Groups of 8 valid rollouts of so many tokens each, of weights (0, 0)."""
    random, n = np.random.default_rng(seed), groups * MEMBERS
    k = n * tokens
    return Rollouts(
        members=MEMBERS,
        position_G=np.arange(groups),
        incarnation_G=np.zeros(groups, dtype=np.int32),
        row_G=np.arange(groups),
        prompt_offset_G1=offsets([PROMPT] * groups),
        prompt_P=random.integers(0, VOCABULARY, groups * PROMPT).astype(np.int32),
        offset_N1=offsets([tokens] * n),
        token_K=random.integers(0, VOCABULARY, k).astype(np.int32),
        logp_K=random.normal(-2.0, 1.0, k).astype(np.float32),
        lineage_K=np.zeros(k, dtype=np.int16),
        step_K=np.zeros(k, dtype=np.int32),
        reward_N=random.normal(size=n).astype(np.float32),
        status_N=np.zeros(n, dtype=np.uint8),
        truncated_N=np.zeros(n, dtype=bool),
        label_N=np.full(n, -1, dtype=np.int8),
        scorer_N=np.zeros(n, dtype=np.uint8),
    )


def as_leased(block: Rollouts, groups: Sequence[GroupId]) -> Rollouts:
    """The block as that of these groups, the first of its own where there are fewer."""
    block = block if len(groups) == block.groups else block.select(0, len(groups))
    position_G, incarnation_G = np.array(groups, dtype=np.int64).T
    return replace(
        block, position_G=position_G, incarnation_G=incarnation_G.astype(np.int32),
        row_G=position_G,
    )  # fmt: skip


def columns(block: Rollouts) -> dict[str, np.ndarray]:
    """Its arrays by name."""
    return {name: value for name, value in vars(block).items() if isinstance(value, np.ndarray)}
