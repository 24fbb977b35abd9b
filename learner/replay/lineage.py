"""Which weights still count after learner restarts, and what rollouts a restart may bring back."""

import numpy as np

from actors.rollout import OFFLINE_STEP, GroupId
from learner.replay.records import Held


class Lineages:
    """Where each past lineage was cut off: steps after that never led to the current weights.

    While `kept` is a dict (a recovery is under way) it collects the groups that retire, for a
    restart that undoes the steps which used them up.
    """

    def __init__(self) -> None:
        self.last_step: dict[int, int] = {}  # of each past lineage, the last that counts
        self.kept: dict[GroupId, Held] | None = None

    def cut(self, lineage: int, step: int) -> None:
        """The lineage ends, and the next one goes on from this step."""
        for past in range(lineage + 1):
            self.last_step[past] = min(step, self.last_step.get(past, step))

    def undone(self, held: Held) -> bool:
        """Whether any token of the group's valid members was made by weights that were undone."""
        if not self.last_step:
            return False
        rows = held.block.select(held.place, held.place + 1)
        valid_K = np.repeat(held.valid_C, rows.length_N)
        for lineage, last in self.last_step.items():
            late_K = (rows.lineage_K == lineage) & (rows.step_K > last)
            if bool((late_K & valid_K & (rows.step_K != OFFLINE_STEP)).any()):
                return True
        return False

    def keep(self, group: GroupId, held: Held) -> None:
        """A group retires from the queue."""
        if self.kept is not None:
            self.kept[group] = held
