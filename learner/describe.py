"""What a step's record says of its minibatch, and rollouts for people to read."""

from typing import Any

import numpy as np

from actors.rollout import Rollouts
from learner.replay.records import Index


def describe(index: Index) -> dict[str, Any]:
    """Tags and rewards of a minibatch's valid rollouts, for the metrics line."""
    valid_M = index.valid_M
    reward = index.reward_M[valid_M]
    known = reward[~np.isnan(reward)]
    ages = {} if index.offline else _count(index.age_M[valid_M])
    return {
        "age": ages,
        "reuse": _count(index.reuse_M[valid_M]),
        "reward_mean": float(known.mean()) if len(known) else None,
        "response_length": float(index.length_M[valid_M].mean()) if valid_M.any() else None,
        "truncated_fraction": float(index.truncated_M[valid_M].mean()) if valid_M.any() else None,
        "tokens": int(index.length_M[valid_M].sum()),
        "rollouts": int(valid_M.sum()),
    }


def _count(values: np.ndarray) -> dict[int, int]:
    which, counts = np.unique(values, return_counts=True)
    return dict(zip(which.tolist(), counts.tolist()))


def readable(block: Rollouts, group: int, round_: int) -> dict[str, Any]:
    """A group's first rollout, for people to read."""
    rollout = group * block.members
    start, stop = block.offset_N1[rollout], block.offset_N1[rollout + 1]
    reward = float(block.reward_N[rollout])
    return {
        "round": round_,
        "position": int(block.position_G[group]),
        "member": 0,
        "prompt": block.prompt(group).tolist(),
        "response": block.response(rollout).tolist(),
        "reward": None if np.isnan(reward) else reward,
        "scorer": block.scorer(rollout) or None,
        "failure": block.failures.get(rollout),
        "steps": sorted(set(block.step_K[start:stop].tolist())),
    }
