"""The objectives of the paper's Table 1, found by name."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from torch import Tensor

from configs.objectives import TABLE, Traits
from configs.schema import ObjectiveConfig
from learner.objectives.base import LossInputs

Loss = Callable[[LossInputs, ObjectiveConfig], Tensor]


@dataclass(frozen=True)
class Objective:
    """A row of Table 1 together with its loss.

    loss: pure; the sum of the loss's terms over a micro-batch, a scalar. The learner divides it by
        the count named by `traits.per` over the whole minibatch.
    """

    name: str
    traits: Traits
    loss: Loss


def load(name: str) -> Objective:
    """The objective that `configs.objectives.TABLE` holds under this name, its loss imported.

    Raises ValueError for a name that is not in the table.
    """
    if name not in TABLE:
        close = get_close_matches(name, TABLE, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(TABLE)}"
        raise ValueError(f"objective.name={name} is no objective; {hint}")
    traits = TABLE[name]
    module, function = traits.loss.split(":")
    return Objective(name, traits, getattr(import_module(module), function))
