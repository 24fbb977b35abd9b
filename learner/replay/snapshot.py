"""The queue's whole state as plain data, for `actors.codec`, and back.

Times go as seconds ago. Weights do not go: their steps do, with `AWAITED` in their place until the
learner publishes them again. Batches that are frozen and not committed do not go either: freezing
them again gives the same.
"""

import time
from collections import Counter
from typing import Any

import numpy as np

from actors.actor import Lease
from actors.codec import block_from, block_tree
from actors.rollout import GroupId, Rollouts, Version, concatenate
from learner.replay.ledger import Ledger
from learner.replay.line import Line, Taken
from learner.replay.queue import ReplayQueue
from learner.replay.records import Held

AWAITED = object()  # in place of weights that are known of, and not here


def take(queue: ReplayQueue) -> dict[str, Any]:
    """The state as a tree of plain data; arrays in it may be views of the queue's own."""
    waiting = {group: held for group, held in queue.line.groups.items() if held is not None}
    return {
        "version": list(queue.version),
        "committed": queue.committed,
        "weights": sorted(queue.weights),
        "lineages": [list(item) for item in queue.lineages.last_step.items()],
        "row_reuse": [[*key, count] for key, count in queue.row_reuse.items()],
        "ledger": _ledger_tree(queue.ledger),
        "rounds": [[number, ids, rewards] for number, (ids, rewards) in queue.rounds.items()],
        "held": _held_tree({**queue.held, **waiting}),
        "line": _line_tree(queue.line),
    }


def restore(queue: ReplayQueue, tree: dict[str, Any]) -> None:
    """Give a fresh queue the state of `take`."""
    queue.version = Version(*tree["version"])
    queue.committed = tree["committed"]
    queue.weights = dict.fromkeys(tree["weights"], AWAITED)
    queue.lineages.last_step = dict(tree["lineages"])
    queue.row_reuse = Counter({(row, m): count for row, m, count in tree["row_reuse"]})
    _restore_ledger(queue.ledger, tree["ledger"])
    queue.rounds = {
        number: ([GroupId(*id_) for id_ in ids], rewards) for number, ids, rewards in tree["rounds"]
    }
    held = held_from(tree["held"])
    _restore_line(queue.line, tree["line"], held)
    queue.held = {group: h for group, h in held.items() if group not in queue.line.groups}


def _ledger_tree(ledger: Ledger) -> dict[str, Any]:
    return {
        "issued": ledger.issued,
        "in_flight": ledger.in_flight,
        "queued": ledger.queued,
        "retired": dict(ledger.retired),
        "age": list(ledger.age.items()),
        "reuse": list(ledger.reuse.items()),
    }


def _restore_ledger(ledger: Ledger, tree: dict[str, Any]) -> None:
    for name in ("issued", "in_flight", "queued"):
        setattr(ledger, name, tree[name])
    ledger.retired.update(tree["retired"])
    restore_histograms(ledger, tree)


def restore_histograms(ledger: Ledger, tree: dict[str, Any]) -> None:
    """Age and reuse as a state's ledger has them."""
    ledger.age = Counter(dict(tree["age"]))
    ledger.reuse = Counter(dict(tree["reuse"]))


def _held_tree(held: dict[GroupId, Held]) -> dict[str, Any] | None:
    """Groups with their columns put together; derived columns apart, for not all have them."""
    if not held:
        return None
    now = time.monotonic()
    parts = [_plain(h) for h in held.values()]
    names = sorted({name for h in held.values() for name in h.derived})
    return {
        "groups": [[*group, h.reuse, now - h.entered] for group, h in held.items()],
        "block": block_tree(concatenate(parts)),
        "derived": {
            name: {
                "places": [i for i, h in enumerate(held.values()) if name in h.derived],
                "column": np.concatenate(
                    [h.derived[name] for h in held.values() if name in h.derived]
                ),
            }
            for name in names
        },
    }


def _plain(held: Held) -> Rollouts:
    return held.block.select(held.place, held.place + 1)


def held_from(tree: dict[str, Any] | None) -> dict[GroupId, Held]:
    """The groups of a state, in order, those in rounds and those waiting."""
    if tree is None:
        return {}
    block, now = block_from(tree["block"]), time.monotonic()
    everyone, oldest_N = [], block.oldest_step_N()
    for place, (_, _, reuse, ago) in enumerate(tree["groups"]):
        held = Held.of(block, place, oldest_N)
        held.reuse, held.entered = reuse, now - ago
        everyone.append(held)
    for name, part in tree["derived"].items():
        start = 0
        for place in part["places"]:
            held = everyone[place]
            size = held.tokens if name.endswith("_K") else block.members
            held.derived[name] = part["column"][start : start + size]
            start += size
    return {GroupId(p, i): held for (p, i, _, _), held in zip(tree["groups"], everyone)}


def _line_tree(line: Line) -> dict[str, Any]:
    return {
        "groups": [list(group) for group in line.groups],
        "leases": [lease_tree(t.lease) | {"actor": t.actor, "slot": t.slot}
                   for t in line.leases.values()],
        "orphans": [[list(group) for group in out]
                    for groups in line.orphans if (out := line.still_out(groups))],
        "attempts": [[*group, count] for group, count in line.attempts.items()],
        "outcomes": [int(good) for good in line.outcomes],
        "rounds_taken": line.rounds_taken,
        "next_position": line.next_position,
        "next_lease": line.next_lease,
        "last_failure": line.last_failure,
    }  # fmt: skip


def _restore_line(line: Line, tree: dict[str, Any], held: dict[GroupId, Held]) -> None:
    ids = [GroupId(*group) for group in tree["groups"]]
    line.groups = {group: held.get(group) for group in ids}
    now = time.monotonic()
    line.leases = {
        t["id"]: Taken(lease_from(t), t["actor"], t["slot"], now) for t in tree["leases"]
    }
    line.orphans.extend(tuple(GroupId(*g) for g in groups) for groups in tree["orphans"])
    line.attempts = Counter({GroupId(p, i): count for p, i, count in tree["attempts"]})
    line.outcomes.extend(bool(good) for good in tree["outcomes"])
    line.rounds_taken = tree["rounds_taken"]
    line.next_position, line.next_lease = tree["next_position"], tree["next_lease"]
    line.last_failure = tree["last_failure"]


def lease_tree(lease: Lease) -> dict[str, Any]:
    """A lease without its weights."""
    return {
        "id": lease.id,
        "leased": [list(group) for group in lease.groups],
        "version": list(lease.version),
    }


def lease_from(tree: dict[str, Any]) -> Lease:
    """The lease of a `lease_tree`."""
    groups = tuple(GroupId(*group) for group in tree["leased"])
    return Lease(tree["id"], groups, Version(*tree["version"]))
