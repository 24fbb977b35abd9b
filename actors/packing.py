"""From an engine's answers to the packed record of `actors.rollout`."""

from collections.abc import Sequence

import numpy as np

from actors.engine import Request
from actors.rollout import GENERATION_FAILED, UNLABELLED, VALID, Rollouts, offsets


def pack(
    requests: Sequence[Request], members: int, temperature: float, length_N: np.ndarray,
    token_K: np.ndarray, logp_K: np.ndarray, lineage_K: np.ndarray, step_K: np.ndarray,
) -> Rollouts:  # fmt: skip
    """A block of responses without rewards, all of them valid; columns as `Rollouts` has them."""
    n = len(length_N)
    prompts = [np.asarray(r.prompt.ids, dtype=np.int32) for r in requests]
    return Rollouts(
        members=members,
        position_G=np.array([r.id.position for r in requests], dtype=np.int64),
        incarnation_G=np.array([r.id.incarnation for r in requests], dtype=np.int32),
        row_G=np.array([r.prompt.row for r in requests], dtype=np.int64),
        prompt_offset_G1=offsets([len(p) for p in prompts]),
        prompt_P=np.concatenate(prompts),
        offset_N1=offsets(length_N),
        token_K=token_K.astype(np.int32, copy=False),
        logp_K=logp_K.astype(np.float32, copy=False),
        lineage_K=lineage_K.astype(np.int16, copy=False),
        step_K=step_K.astype(np.int32, copy=False),
        reward_N=np.full(n, np.nan, dtype=np.float32),
        status_N=np.full(n, VALID, dtype=np.uint8),
        truncated_N=np.zeros(n, dtype=bool),
        label_N=np.full(n, UNLABELLED, dtype=np.int8),
        scorer_N=np.zeros(n, dtype=np.uint8),
        temperature=temperature,
    )


def fail_group(block: Rollouts, group: int, why: str) -> None:
    """State that a whole group could not be generated."""
    for rollout in range(group * block.members, (group + 1) * block.members):
        block.fail(rollout, GENERATION_FAILED, why)


def does_not_fit(request: Request, longest_prompt: int, vocabulary: int) -> str | None:
    """Why the policy cannot answer a prompt; None where it can."""
    ids = np.asarray(request.prompt.ids)
    if not 0 < len(ids) <= longest_prompt:
        return f"prompt of {len(ids)} tokens; the context leaves 1 … {longest_prompt}"
    if ids.min() < 0 or ids.max() >= vocabulary:
        outside = ids[(ids < 0) | (ids >= vocabulary)][0]
        return f"prompt with token {outside}; the vocabulary has 0 … {vocabulary - 1}"
    return None
