"""Rewards to try a language-model preset with, before there is a real one."""

import numpy as np


def distinct_tokens(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
    """The share of a response's tokens that are its first of their kind, in (0, 1], [n].

    Policies that repeat themselves score low, so there is something to learn; nobody's preference.
    A response without tokens has no such share (ValueError).
    """
    if not all(responses):
        raise ValueError("the response is empty, so it has no share of distinct tokens")
    return np.array([len(set(response)) / len(response) for response in responses])
