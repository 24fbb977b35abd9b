"""Weights told as what an adapter adds to others: what travels with `rollout.adapter_only`.

Whoever receives them has the base's flat array, and makes the merged one of it, so that no engine
needs to know of adapters. No torch.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """A weight W with an adapter, as the flat array has it."""

    start: int
    rows: int
    columns: int
    inputs_first: bool  # whether its rows are its layer's inputs, as GPT-2 has it


@dataclass
class LowRank:
    """W + scale·B·A at each place; the base's numbers everywhere else.

    base: a list with whatever gives the base's flat array. number_a: A, [rank, inputs], and B,
    [outputs, rank], of each place in turn, float32.
    """

    base: list[Any]
    places: list[Place]
    rank: int
    scale: float  # alpha / rank
    number_a: np.ndarray

    def onto(self, base: np.ndarray) -> np.ndarray:
        """The merged flat array, a fresh one. base: the flat array that `self.base` stands for."""
        flat, at = base.copy(), 0
        for start, rows, columns, inputs_first in self.places:
            inputs, outputs = (rows, columns) if inputs_first else (columns, rows)
            middle, end = at + self.rank * inputs, at + self.rank * (inputs + outputs)
            A_RI = self.number_a[at:middle].reshape(self.rank, inputs)
            B_OR = self.number_a[middle:end].reshape(outputs, self.rank)
            delta_OI = self.scale * (B_OR @ A_RI)
            flat[start : start + rows * columns] += (
                delta_OI.T if inputs_first else delta_OI
            ).reshape(-1)
            at = end
        return flat
