"""The bandit through the whole system, beside a bare loop of transformers and torch in one process
that does the same work (`benchmarks.bandit_loop`): samples, updates, divergences, evaluations.

Both have the preset's B, C, M, T, network and optimizer. Two questions:

- *lockstep, one core*: what does the system cost? Both sides are confined to one core: the bare
  loop's process, and of the system all processes with all their threads, Ray's daemons too
  (`racing.pin`). There is nothing to overlap with, so the ratio is at most 1.
- *pipelined, two cores*: what does it give, once actors and learner have a core each? One actor, B
  = M, T = 1; the same bare loop on one core, since torch's second thread slows such a small
  network.

All take turns, in kept processes. Rates are updates per second from the first batch that is asked
for to the last evaluation; compiling, fitting π_ref and starting are not in it.
"""

import os
import statistics
import tempfile
import time
from typing import Any

from benchmarks import racing
from benchmarks.bandit_loop import BareLoop
from benchmarks.outside import own_settings
from cluster import connection, inputs
from cluster.crew import Crew
from configs.load import prepare

SETTINGS = {"turns": 3, "updates": 200}
# Name: preset, settings, share of `updates` in a turn, cores that the system has.
WORKLOADS: dict[str, tuple[str, list[str], float, int]] = {
    "ipo, T=10, lockstep": ("bandit", [], 1.0, 1),
    "best_of_n, T=1, lockstep": ("bandit_best_of_n", ["replay.inner_epochs=1"], 0.4, 1),
    "best_of_n, T=1, pipelined": ("bandit_pipelined", ["rollout.actors=1"], 0.4, 2),
}
TARGETS = {"lockstep": 0.8, "pipelined": 1.0}


def main(overrides: list[str]) -> None:
    """Print the ratio of rates, its spread, and where an update's time goes."""
    own, rest = own_settings(overrides, SETTINGS, least=1)
    cores = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    crew = Crew(keep=True)
    ray_up = connection.connected(prepare("bandit", rest).cluster)
    with tempfile.TemporaryDirectory() as folder, ray_up:
        try:
            for name in WORKLOADS:  # processes start, networks are fitted
                _pair(name, 20, rest, crew, f"{folder}/warm", cores, warm=True)
            for turn in range(own["turns"]):
                for name in WORKLOADS:
                    updates = round(WORKLOADS[name][2] * own["updates"])
                    row = _pair(name, updates, rest, crew, f"{folder}/{turn}", cores)
                    rows.append({"turn": turn, **row})
                    print(_line(rows[-1]), flush=True)
        finally:
            racing.pin(cores)
            crew.end()
    print(_parts(rows))
    for name in WORKLOADS:
        print(_verdict(name, [row for row in rows if row["workload"] == name]))
    racing.write("bandit", own, rest, rows)


def _pair(
    name: str, updates: int, rest: list[str], crew: Crew, folder: str, cores: list[int],
    warm: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The bare loop and the system, one after the other; seconds per update.

    warm: for the sake of the processes that it starts, on all cores.
    """
    preset, settings, _, wanted = WORKLOADS[name]
    given = [*settings, f"learner.updates={updates}", *rest]
    config = prepare(preset, given)
    prompts = inputs.prompts(config)
    contexts = [int(prompts[position].ids[0]) for position in range(config.prompts.count)]
    racing.pin(cores if warm else cores[:1])
    loop = BareLoop(config, contexts)
    loop.sample(1)
    began = time.process_time()
    bare = loop.run(updates)
    bare_cpu = time.process_time() - began
    racing.pin(cores if warm else cores[:wanted])
    summary = racing.turn(preset, given, crew, folder, name.split(",")[0] + f"-{wanted}")
    cpu = summary["cpu_per_update"]
    parts, system = summary["seconds_per_update"], summary["train_seconds"] / updates
    return {
        "workload": name,
        "updates": updates,
        "cores": min(wanted, len(cores)),
        "bare": bare / updates,
        "bare_cpu": bare_cpu / updates,
        "bare_parts": {part: seconds / updates for part, seconds in loop.seconds.items()},
        "system": system,
        "ratio": bare / updates / system,
        "cpu_ratio": bare_cpu / updates / sum(cpu.values()) if cpu else None,
        "parts": {**parts, "driver": system - sum(parts.values())},
        "cpu": cpu,
        "actor": {k: v / updates for k, v in summary["actor_seconds"].get(0, {}).items()},
        "idle": summary["idle"],
        "reward": {"bare": loop.evaluated[-1]["reward_eval"], "system": summary["reward_eval"]},
    }


def _line(row: dict[str, Any]) -> str:
    of_cpu = "" if row["cpu_ratio"] is None else f", of CPU time {row['cpu_ratio']:.2f}"
    return (
        f"{row['workload']}: bare {1e3 * row['bare']:.1f} ms, system {1e3 * row['system']:.1f} ms "
        f"on {row['cores']} core(s) per update, ratio {row['ratio']:.2f}{of_cpu}; reward "
        f"{row['reward']['bare']:.2f} and {row['reward']['system']:.2f}"
    )


def _parts(rows: list[dict[str, Any]]) -> str:
    """Medians over the turns, ms per update."""
    lines = ["where an update's time goes, ms, medians:"]
    kinds = {
        "bare_parts": "bare loop", "parts": "system, by the learner's clock",
        "actor": "system, by the actor's clock", "cpu": "system, CPU time by process",
    }  # fmt: skip
    for name in WORKLOADS:
        lines.append(f"  {name}")
        chosen = [row for row in rows if row["workload"] == name]
        for kind, meaning in kinds.items():
            found = [row[kind] for row in chosen if row[kind]]
            middle = {
                part: 1e3 * statistics.median(one.get(part, 0.0) for one in found)
                for part in (found[0] if found else {})
            }
            shown = "  ".join(f"{part} {ms:.1f}" for part, ms in middle.items())
            lines.append(f"    {meaning}: {shown}")
    meaning = (
        "wait: for a batch (in lockstep with generation, score and queue in it); step: forward, "
        "backward, optimizer and measures; publish: weights read out and handed over, commit; "
        "driver: between its calls, and the evaluation at the end"
    )
    return "\n".join([*lines, meaning])


def _verdict(name: str, rows: list[dict[str, Any]]) -> str:
    target = TARGETS[name.split(", ")[-1]]
    ratios = [row["ratio"] for row in rows]
    reached = "reached" if statistics.median(ratios) >= target else "NOT REACHED"
    cpu = [row["cpu_ratio"] for row in rows if row["cpu_ratio"] is not None]
    of_cpu = f"; of CPU time {racing.spread(cpu)}" if cpu else ""
    return (
        f"{name}: rate of the system / rate of the bare loop = {racing.spread(ratios)}{of_cpu}, "
        f"{len(rows)} turns of {rows[0]['updates']} updates, target {target}: {reached}"
    )
