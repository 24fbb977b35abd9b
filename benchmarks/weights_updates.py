"""One update after another, beside clones: the rows of the update table of `benchmarks.weights`."""

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from cluster.remote import spawn
from configs.schema import Config

LIMITS = {"torch": 1.0, "vllm": 1.5}  # times the clone, after ALLOWANCE
ALLOWANCE = 0.040  # seconds that an update may cost at any size
STALL_LIMIT = 0.5  # of an update in mid-generation, for what the engine stands still
TOGETHER, TOGETHER_LIMIT = 2, 2.0  # actors at once, and their update over that of one
UNDER_WAY = 0.15  # seconds after which generation is in the middle
POLL_SECONDS = 5.0


def updates(
    size: str, engine: str, config: Config, repeats: int, prompts: int
) -> list[dict[str, Any]]:
    """Rows of the update table: one actor; vLLM's in mid-generation too; TOGETHER actors."""
    with ExitStack() as stack:
        sender, _ = stack.enter_context(started("Sender", config, f"{size}: learner's side"))
        common = {"size": size, "engine": engine,
                  "parameters": ray.get(sender.call.remote("parameters"))}  # fmt: skip
        fleet: list[Any] = []
        starts: list[float] = []
        rows: list[dict[str, Any]] = []
        busy = [(1, prompts)] if engine == "vllm" else []
        for actors, generating in [(1, 0), *busy, (TOGETHER, 0)]:
            while len(fleet) < actors:
                what = f"{size}: {engine} actor {len(fleet)}"
                actor, seconds = stack.enter_context(started("Receiver", config, what))
                fleet.append(actor)
                starts.append(seconds)
            doing = "generating" if generating else "idle"
            print(f"{size}: {engine}, {actors} actor(s), {doing}", flush=True)
            measured = [
                _pair(sender, fleet, config, generating, repeat) for repeat in range(repeats + 1)
            ]
            row = {**common, "actors": actors, "generating": bool(generating),
                   "start_seconds": starts[:actors], **_row(measured)}  # fmt: skip
            rows.append(row | _verdict(row, rows[0] if rows else row))
        return rows


def _pair(
    sender: Any, fleet: list[Any], config: Config, prompts: int, repeat: int
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one clone and of one update after it, until the last actor may generate, while the
    first answers `prompts` (0: idle)."""
    seconds = config.limits.wait_seconds
    clone = ray.get(sender.call.remote("clone"), timeout=seconds)
    generation = None
    if prompts:
        generation = fleet[0].call.remote("generate", prompts)
        time.sleep(UNDER_WAY)
    sent = ray.get(sender.call.remote("publish"), timeout=seconds)
    calls = [actor.call.remote("update", sent["weights"], repeat) for actor in fleet]
    taken = max(ray.get(calls, timeout=seconds), key=lambda one: one["resumed"])
    made: dict[str, Any] = {"versions": 1}
    if generation:
        made = ray.get(generation, timeout=seconds)
    return {
        "clone": clone,
        "update": taken["resumed"] - sent["started"],
        "in_flight": made["versions"] > 1,
        "parts": {
            "read": sent["read"] - sent["started"],
            "put": sent["put"] - sent["read"],
            "hand_over": taken["arrived"] - sent["put"],
            "get": taken["got"] - taken["arrived"],
            **taken["parts"],
        },
        **({"stall": taken["stall"], **_silence(made["came"], taken)} if prompts else {}),
    }


def _silence(came: list[float], taken: dict[str, Any]) -> dict[str, float]:
    """From the times at which tokens came: the longest time without any that an update had a part
    in, its caches computed anew included, and the usual time between them, its median."""
    gaps = list(itertools.pairwise(came))
    around = [b - a for a, b in gaps if b > taken["got"] and a < taken["resumed"]]
    return {
        "silent": max(around, default=0.0),
        "step": statistics.median([b - a for a, b in gaps] or [0.0]),
    }


def _row(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges in ms over all but the first, which fills caches and touches memory."""
    first, *rest = measured
    clone, update = ([m[name] for m in rest] for name in ("clone", "update"))
    baseline, cost = statistics.median(clone), statistics.median(update)
    names = dict.fromkeys(name for m in rest for name in m["parts"])
    return {
        "clone_ms": 1e3 * baseline,
        "clone_all_ms": [1e3 * seconds for seconds in clone],
        "update_ms": 1e3 * cost,
        "update_all_ms": [1e3 * seconds for seconds in update],
        "first_ms": 1e3 * first["update"],
        "ratio": cost / baseline,
        "ratio_less_allowance": max(0.0, cost - ALLOWANCE) / baseline,
        "in_flight": sum(m["in_flight"] for m in rest),
        "parts_ms": {
            name: 1e3 * statistics.median(m["parts"].get(name, 0.0) for m in rest)
            for name in names
        },
        **{
            f"{name}_ms": 1e3 * statistics.median(m[name] for m in rest)
            for name in ("stall", "silent", "step")
            if name in first
        },
    }  # fmt: skip


def _verdict(row: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """`share`: what the limit is for, and whether it is `within`. alone: the row of one idle actor.

    One actor: (update − ALLOWANCE) / clone. Generating: the stall / its whole update. Several: the
    update / that of one.
    """
    if row["generating"]:
        share, limit = row["stall_ms"] / row["update_ms"], STALL_LIMIT
    elif row["actors"] > 1:
        share, limit = row["update_ms"] / alone["update_ms"], TOGETHER_LIMIT
    else:
        share, limit = row["ratio_less_allowance"], LIMITS[row["engine"]]
    return {"share": share, "limit": limit, "within": share <= limit}


@contextmanager
def started(kind: str, config: Config, what: str) -> Iterator[tuple[Any, float]]:
    """A process of `benchmarks.weights_parts` and the seconds it took to start; it ends with the
    block."""
    actor, seconds = start(kind, config, what)
    try:
        yield actor, seconds
    finally:
        end(actor)


def start(kind: str, config: Config, what: str) -> tuple[Any, float]:
    """The same, to be ended by `end`; TimeoutError after `limits.startup_seconds`."""
    begun = time.monotonic()
    actor = spawn(f"benchmarks.weights_parts:{kind}", config, num_cpus=0, max_concurrency=2)
    call = actor.call.remote("ready")
    while not ray.wait([call], timeout=POLL_SECONDS)[0]:
        spent = time.monotonic() - begun
        print(f"  {what} is starting, {spent:.0f} s", flush=True)
        if spent > config.limits.startup_seconds:
            raise TimeoutError(f"{what} is not ready after {spent:.0f} s")
    ray.get(call)
    seconds = time.monotonic() - begun
    print(f"  {what} is ready after {seconds:.1f} s", flush=True)
    return actor, seconds


def end(actor: Any) -> None:
    """End a process, and vLLM's below it."""
    ray.wait([actor.call.remote("close")], timeout=30.0)
    ray.kill(actor)
