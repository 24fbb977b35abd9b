"""A queue's state again, from its journal: the base, and the operations since, done again in order.

The queue does the same on the same operations, so this gives the very state that was lost, but for
weights (`snapshot.AWAITED` stands in their place).
"""

from collections.abc import Callable
from typing import Any

from actors.actor import Lease
from actors.codec import DamagedError, block_from, block_tree
from actors.rollout import GroupId, Rollouts, Version
from configs.errors import one_line
from learner.replay import snapshot
from learner.replay.journal import Journal, read_base, read_head
from learner.replay.queue import ReplayQueue
from learner.replay.snapshot import AWAITED, lease_from, lease_tree

NewQueue = Callable[[], ReplayQueue]


class _Senseless(Exception):
    """An operation that cannot follow those before it, and may be half done: segment and place."""

    def __init__(self, number: int, place: int) -> None:
        super().__init__(number, place)
        self.number, self.place = number, place


def recover(new: NewQueue, journal: Journal, batch: int | None = None) -> ReplayQueue | None:
    """The queue as the journal has it last; None where the journal has no base.

    batch: start from the cut at this batch, so that `lineages.kept` has what retired since; else
    from the newest base. An operation that makes no sense ends the reading, as damage does: then
    all is done once more, without it.
    """
    ends: dict[int, int] = {}  # by segment: operations of it that make sense
    while True:
        try:
            return _recovered(new, journal, batch, ends)
        except _Senseless as found:
            ends[found.number] = found.place


def _recovered(
    new: NewQueue, journal: Journal, batch: int | None, ends: dict[int, int]
) -> ReplayQueue | None:
    numbers = journal.numbers()
    for start in reversed(numbers):
        if (queue := _from_base(new, journal, start, batch)) is not None:
            break
    else:
        return None
    for number in [n for n in numbers if n >= start]:
        if number > start and _kind(journal, number) == "roll_back":
            if (back := _from_base(new, journal, number, None)) is None:
                break
            queue = back
        if not _replay(queue, journal, number, ends.get(number)):
            break
    return queue


def _from_base(
    new: NewQueue, journal: Journal, number: int, batch: int | None
) -> ReplayQueue | None:
    """The queue of a segment's base, where that is whole, and at this batch if one is named."""
    try:
        if batch is not None and read_head(journal.base(number))[0] != batch:
            return None
        return restored(new, read_base(journal.base(number))[2])
    except DamagedError:
        return None


def _kind(journal: Journal, number: int) -> str:
    try:
        return read_head(journal.base(number))[1]
    except DamagedError:
        return ""


def restored(new: NewQueue, state: dict[str, Any]) -> ReplayQueue:
    """A queue with this state, that keeps what retires from now on.

    DamagedError where the state is not one of this configuration's.
    """
    queue = new()
    try:
        snapshot.restore(queue, state)
        problem = "" if _agrees(queue) else "its books do not agree with what it holds"
    except Exception as error:  # a state is data: whatever it does not fit
        problem = one_line(repr(error))
    if problem:
        raise DamagedError(f"not a state of the queue: {problem}")
    queue.lineages.kept = {}
    return queue


def _agrees(queue: ReplayQueue) -> bool:
    """Whether the ledger counts what the queue holds, in groups of this configuration's size."""
    members, waiting = queue.plan.members, queue.line.groups.values()
    held = [h for h in [*waiting, *queue.held.values()] if h is not None]
    return (
        queue.ledger.balanced
        and queue.ledger.in_flight == members * sum(h is None for h in waiting)
        and queue.ledger.queued == sum(h.valid for h in held)
        and all(h.block.members == members for h in held)
    )


def _replay(queue: ReplayQueue, journal: Journal, number: int, end: int | None) -> bool:
    """Do a segment's operations, at most up to `end`; False where it ends before the log does."""
    for place, operation in enumerate(journal.operations(number)):
        if place == end:
            return False
        try:
            _apply(queue, operation)
        except Exception as error:  # an operation is data: whatever it does not fit
            raise _Senseless(number, place) from error
        if not queue.ledger.balanced:
            raise _Senseless(number, place)
    return True


# Each operation as it is written, and what doing it again means.


def leased(actor: int, slot: int, done: int | None) -> dict[str, Any]:
    """A lease was given out."""
    return {"do": "lease", "actor": actor, "slot": slot, "done": done}


def put(lease: Lease, block: Rollouts) -> dict[str, Any]:
    """A lease came back."""
    return {"do": "put", "lease": lease_tree(lease), "block": block_tree(block)}


def released(actor: int | None, blame: bool) -> dict[str, Any]:
    """An actor's leases went back."""
    return {"do": "release", "actor": actor, "blame": blame}


def published(version: Version) -> dict[str, Any]:
    """Weights became known."""
    return {"do": "publish", "version": list(version)}


def frozen(number: int) -> dict[str, Any]:
    """A batch was composed."""
    return {"do": "freeze", "number": number}


def committed(
    lineage: int, number: int, rank: int, stepped: bool, derived: dict[str, Any]
) -> dict[str, Any]:
    """A rank reported on a batch."""
    return {
        "do": "commit", "lineage": lineage, "number": number, "rank": rank, "stepped": stepped,
        "derived": derived,
    }  # fmt: skip


def pending(queue: ReplayQueue) -> list[dict[str, Any]]:
    """What a state leaves out: batches frozen, and what ranks have said of them."""
    operations = []
    for number, reports in queue.pending():
        operations.append(frozen(number))
        for rank, (stepped, derived) in reports.items():
            operations.append(committed(queue.version.lineage, number, rank, stepped, derived))
    return operations


def _apply(queue: ReplayQueue, op: dict[str, Any]) -> None:
    match op["do"]:
        case "lease":
            queue.lease(op["actor"], op["slot"], op["done"])
        case "put":
            block = block_from(op["block"])
            if block.members != queue.plan.members:
                raise ValueError(f"groups of {block.members}, and not of {queue.plan.members}")
            queue.put(lease_from(op["lease"]), block)
        case "release":
            queue.release(op["actor"], op["blame"])
        case "publish":
            queue.publish(Version(*op["version"]), AWAITED)
        case "freeze":
            queue.freeze(op["number"])
        case "commit":
            queue.commit(op["lineage"], op["number"], op["rank"], op["stepped"], op["derived"])
        case unknown:
            raise ValueError(f"unknown operation {unknown!r}")


def account_for_lost(queue: ReplayQueue, live: ReplayQueue) -> None:
    """What the queue in memory had issued and its journal, for a full disk, does not know of.

    Those rollouts are `lost`; their positions come again as the next incarnation. Leases that the
    journal still has, and that were handed in, are issued again.
    """
    queue.line.next_lease = max(queue.line.next_lease, live.line.next_lease)
    first, last = queue.line.next_position, live.line.next_position
    if last > first:
        lost = tuple(GroupId(position, 1) for position in range(first, last))
        rollouts = len(lost) * queue.plan.members
        queue.ledger.issue(2 * rollouts)
        queue.ledger.retire_in_flight("lost", rollouts)
        queue.line.next_position = last
        queue.line.groups.update(dict.fromkeys(lost))
        size = queue.plan.lease
        queue.line.orphans.extend(lost[i : i + size] for i in range(0, len(lost), size))
    for id_ in [id_ for id_ in queue.line.leases if id_ not in live.line.leases]:
        queue.line.orphans.append(queue.line.leases.pop(id_).lease.groups)
