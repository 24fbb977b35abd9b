"""Back to a checkpoint: what the learner did after it is undone in the queue's books.

The checkpoint's rounds come back with the reuse counts they had. Whatever entered later stays in
the line, unused, unless weights that are undone made any of its tokens: then it retires as
`rolled_back` and its position comes again as the next incarnation. What was in flight still is.
"""

from itertools import groupby
from typing import Any

from actors.rollout import GroupId, Version
from learner.replay import snapshot
from learner.replay.queue import ReplayQueue
from learner.replay.records import Held


def roll_back(queue: ReplayQueue, tree: dict[str, Any], lineage: int) -> None:
    """Take the queue back to the state `tree`, under a new lineage.

    `queue.lineages.kept` must have what retired since then. The ledger's counts of failures stand:
    what failed has failed.
    """
    cut = ReplayQueue(queue.plan, queue.ranks, queue.line.rules)
    snapshot.restore(cut, tree)
    for past in range(lineage):
        queue.lineages.cut(past, cut.version.step)
    later = _later(queue, cut)
    queue.version = Version(lineage, cut.version.step)
    queue.committed = cut.committed
    queue.rounds, queue.held, queue.row_reuse = cut.rounds, cut.held, cut.row_reuse
    queue.weights = {}
    queue.forget_open()
    queue.line.groups = later
    queue.line.rounds_taken = cut.line.rounds_taken
    _recount(queue, cut)
    undone = [g for g, held in later.items() if held is not None and queue.lineages.undone(held)]
    for _, groups in groupby(undone, key=lambda g: id(_block(later[g]))):
        queue.line.come_again(list(groups))
    assert queue.ledger.balanced, queue.ledger


def _block(held: Held | None) -> object:
    return None if held is None else held.block


def _later(queue: ReplayQueue, cut: ReplayQueue) -> dict[GroupId, Held | None]:
    """Every group that lives and is in no round of the cut, unused, in issue order."""
    everyone: dict[GroupId, Held | None] = dict(queue.line.groups)
    everyone.update(queue.held)
    everyone.update(queue.lineages.kept or {})
    for group in cut.held:
        everyone.pop(group, None)
    for held in everyone.values():
        if held is not None:
            held.reuse = 0
            held.derived.clear()
    return dict(sorted(everyone.items()))


def _recount(queue: ReplayQueue, cut: ReplayQueue) -> None:
    """Counts of what lives, from what lives; those of consumption, from the cut."""
    ledger, line = queue.ledger, queue.line.groups
    for reason in ("exhausted", "expired"):
        ledger.retired[reason] = cut.ledger.retired[reason]
    ledger.age, ledger.reuse = cut.ledger.age, cut.ledger.reuse
    waiting = [held for held in line.values() if held is not None]
    ledger.queued = sum(held.valid for held in [*queue.held.values(), *waiting])
    ledger.in_flight = queue.plan.members * sum(held is None for held in line.values())
