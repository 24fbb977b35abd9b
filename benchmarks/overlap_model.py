"""A model, and no measurement: rounds, leases and admission as a discrete-event simulation.

Driven by stage times, it says how long an optimizer step takes and how much of the time actors and
learner wait. `bench overlap` feeds it measured times and shows its figures beside real runs with 1
… 4 actors; `at_scale` feeds it long-tailed response lengths on 128 GPUs, which nobody here has.

What it keeps of the system: leases in issue order, each generated whole by one of an actor's slots;
admission by `replay.max_age` (law 6); lockstep, where a round's leases wait for the batch before
it; a round is taken up whole; weights are there `publish` seconds after the step. What it leaves
out: failures, restarts, skipped steps, evaluations, checkpoints; stages that slow each other down,
as more processes than cores do.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class System:
    """What is simulated. Seconds; `max_age` None is lockstep.

    lease: seconds of lease number n, from its weights' load to its put. step: of optimizer step n,
    from its batch to its commit. publish: from a commit to a lease that has its weights, and
    likewise from a put to the batch that has it.
    """

    leases: int  # per round
    batches: int  # S, per round
    actors: int
    lease: Callable[[int], float]
    step: Callable[[int], float]
    max_age: int | None = None
    slots: int = 1  # leases that an actor serves at once
    publish: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to, over all its steps but the first rounds."""

    step_seconds: float  # wall time per optimizer step
    actor_idle: float  # share of the slots' time without a lease
    learner_idle: float  # share of the time that the learner waits for a batch
    ages: tuple[int, int]  # the least and the greatest age that was consumed


def simulate(system: System, rounds: int, warm: int = 2) -> Outcome:
    """Run so many rounds; the first `warm` of them are not in the outcome.

    ValueError for a budget that no round can keep.
    """
    s, budget = system.batches, system.max_age
    if budget is not None and budget < s - 1:
        raise ValueError(f"max_age={budget} is less than S - 1 = {s - 1}")
    if rounds <= warm:
        raise ValueError(f"rounds={rounds} must be more than warm={warm}")
    free = [0.0] * (system.actors * system.slots)  # when each slot is free
    ready = np.zeros(rounds * system.leases)  # when each lease's block is in the queue
    began_at = np.zeros_like(ready)
    done = np.zeros(rounds * s)  # when each step's weights are there
    began = np.zeros(rounds * s)
    clock, leased = 0.0, 0
    for step in range(rounds * s):
        first = step // s * system.leases
        while leased < first + system.leases:
            leased = _lease(system, leased, step, done, free, began_at, ready)
        began[step] = max(clock, float(ready[first : first + system.leases].max()))
        clock = began[step] + system.step(step)
        done[step] = clock + system.publish
        # Leases that this step admits start before the learner waits again.
        while leased < len(ready) and _needs(system, leased) <= step + 1:
            leased = _lease(system, leased, step + 1, done, free, began_at, ready)
    return _outcome(system, rounds, warm, began, done, began_at, ready)


def _needs(system: System, lease: int) -> int:
    """Steps that must be done before this lease may start: r·S + S − 1 − v ≤ max_age."""
    round_ = lease // system.leases
    if system.max_age is None:
        return round_ * system.batches
    return max(0, round_ * system.batches + system.batches - 1 - system.max_age)


def _lease(
    system: System, lease: int, steps: int, done: np.ndarray, free: list[float],
    began_at: np.ndarray, ready: np.ndarray,
) -> int:  # fmt: skip
    """Give the next lease to the slot that is free first; returns the number of the one after."""
    needs = _needs(system, lease)
    assert needs <= steps, "a batch waits for a lease that waits for it"
    admitted = float(done[needs - 1]) if needs else 0.0
    start = max(heapq.heappop(free), admitted)
    began_at[lease] = start
    end = start + system.lease(lease)
    heapq.heappush(free, end)
    ready[lease] = end + system.publish
    return lease + 1


def _outcome(
    system: System, rounds: int, warm: int, began: np.ndarray, done: np.ndarray,
    began_at: np.ndarray, ready: np.ndarray,
) -> Outcome:  # fmt: skip
    s = system.batches
    first, last = done[warm * s - 1] if warm else 0.0, done[-1]
    seconds = last - first
    end_at = ready - system.publish
    inside = np.minimum(end_at, last) - np.maximum(began_at, first)
    busy = float(inside.clip(0.0).sum())
    steps = done[warm * s :] - system.publish - began[warm * s :]
    version = np.searchsorted(done, began_at, side="right")  # steps whose weights were there
    oldest = version.reshape(rounds, system.leases).min(1)
    newest = version.reshape(rounds, system.leases).max(1)
    number = np.arange(rounds)[warm:]
    return Outcome(
        step_seconds=float(seconds / ((rounds - warm) * s)),
        actor_idle=1.0 - busy / (seconds * system.actors * system.slots),
        learner_idle=max(0.0, 1.0 - float(steps.sum()) / float(seconds)),
        ages=(
            int((number * s - newest[warm:]).min()),
            int((number * s + s - 1 - oldest[warm:]).max()),
        ),
    )


@dataclass(frozen=True)
class Cluster:
    """128 GPUs and what is assumed of them; times in units of one mean response on one GPU's slot.

    Half of the GPUs generate and half train, one actor to a GPU. A response takes time in
    proportion to its length, whatever else its GPU has in hand (decoding is bound by memory,
    not by sums). Lengths are log-normal, cut at `longest`, drawn anew for each response.
    Training takes time in proportion to the round's tokens and is spread evenly over its GPUs;
    at the mean it takes `balance` times as long as generation would without its tail. Weights
    take `publish`.
    """

    gpus: int = 128
    round: int = 1024  # responses
    slots: int = 8  # leases that a GPU serves at once, a response each
    sigma: float = 1.0  # of log length
    longest: float = 8.0  # mean lengths of the uncut distribution
    balance: float = 1.0
    publish: float = 0.05


@dataclass(frozen=True)
class Scaled:
    """Steps per unit of time over those of synchronous training."""

    over_split: float  # lockstep on the same halves
    over_colocated: float  # all GPUs generate, then all train: the best synchronous use
    actor_idle: float
    learner_idle: float
    age: int  # the greatest


def at_scale(cluster: Cluster, max_age: int, rounds: int = 40, seed: int = 0) -> Scaled:
    """Pipelined rounds, B = M and T = 1, beside both synchronous ways, on equal lengths."""
    random = np.random.default_rng(seed)
    scale = np.exp(-(cluster.sigma**2) / 2)  # so that the mean before the cut is 1
    length = random.lognormal(0.0, cluster.sigma, (rounds, cluster.round)) * scale
    length = length.clip(max=cluster.longest)
    half = cluster.gpus // 2
    no_tail = cluster.round * float(length.mean()) / (half * cluster.slots)
    train_R = cluster.balance * no_tail * length.mean(1) / float(length.mean())

    def run(actors: int, age: int | None, share: float) -> Outcome:
        """share: of the GPUs that train, in halves."""
        return simulate(
            System(
                leases=cluster.round, batches=1, actors=actors, slots=cluster.slots,
                lease=lambda n: float(length.flat[n]),
                step=lambda n: float(train_R[n]) / share, max_age=age, publish=cluster.publish,
            ),
            rounds, warm=max_age + 2,
        )  # fmt: skip

    pipelined = run(half, max_age, 1.0)
    split, colocated = run(half, None, 1.0), run(cluster.gpus, None, 2.0)
    return Scaled(
        over_split=split.step_seconds / pipelined.step_seconds,
        over_colocated=colocated.step_seconds / pipelined.step_seconds,
        actor_idle=pipelined.actor_idle, learner_idle=pipelined.learner_idle,
        age=pipelined.ages[1],
    )  # fmt: skip


def scale_table(
    ages: tuple[int, ...] = (1, 2, 4, 8), sigmas: tuple[float, ...] = (0.0, 0.6, 1.0)
) -> str:
    """`at_scale` by tail and budget, as text."""
    lines = [
        "  sigma  max_age  over lockstep, same halves  over colocated  actors idle  learner idle"
    ]
    for sigma in sigmas:
        for age in ages:
            got = at_scale(Cluster(sigma=sigma), age)
            lines.append(
                f"  {sigma:5.1f}  {age:7d}  {got.over_split:26.2f}  {got.over_colocated:14.2f}  "
                f"{got.actor_idle:11.0%}  {got.learner_idle:12.0%}"
            )
    return "\n".join(lines)
