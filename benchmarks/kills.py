"""kill -9 of random parts of one long run, beside the same run undisturbed.

Settings of its own: kills=200 seed=0 apart=5 (steps that the run must make between two kills); all
others are the run's. Victims are processes of rollout actors, learner, evaluator, queue and reward
replicas, drawn by the seed from those alive. Whether it is all kept: the summaries' rewards and
ledgers, printed side by side.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.outside import OutsideRun, own_settings, part, write

FOLDER = Path("runs/kills")
SPARE = 15  # updates that a run makes, on average, before the next kill comes
PATIENCE = 600.0  # seconds for a run to come back from one kill
LIMITS = [
    "checkpoint.every=20", "checkpoint.seconds=0", "limits.actor_restarts=100000",
    "limits.learner_restarts=100000", "limits.queue_restarts=100000",
    "limits.evaluator_restarts=100000", "limits.prompt_attempts=1000",
    "limits.backoff_seconds=0.05", "limits.queue_seconds=20", "eval.every=100", "eval.samples=200",
]  # fmt: skip


def main(overrides: list[str]) -> None:
    """Run it, print and keep the record."""
    own, rest = own_settings(overrides, {"kills": 200, "seed": 0, "apart": 5})
    updates = (own["kills"] + 10) * (own["apart"] + SPARE)
    settings = [*LIMITS, f"learner.updates={updates}", "resume=never", *rest]
    disturbed = OutsideRun("bandit_pipelined", settings, FOLDER, "disturbed")
    killed = kill(disturbed, own["kills"], own["apart"], random.Random(own["seed"]))
    record: dict[str, Any] = {"killed": dict(killed), "disturbed": _told(disturbed)}
    record["undisturbed"] = _told(OutsideRun("bandit_pipelined", settings, FOLDER, "undisturbed"))
    record |= {"settings": own, "command": " ".join(["bench", "kills", *overrides])}
    _print(record)
    print(write("kills", record))


def kill(run: OutsideRun, kills: int, apart: int, draw: random.Random) -> Counter[str]:
    """Kill parts one after another, each once the run has gone on; counts by title."""
    killed: Counter[str] = Counter()
    step = apart
    while killed.total() < kills and run.wait_for_step(step, PATIENCE):
        victims = run.parts()
        if not victims:
            continue
        victim = draw.choice(victims)
        name = part(victim)
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
        killed[name] += 1
        step = run.step() + apart
        print(f"{killed.total()}/{kills} killed, step {run.step()}", file=sys.stderr)
    return killed


def _told(run: OutsideRun) -> dict[str, Any]:
    """What the summary says that matters here."""
    summary = run.finish(3600.0)
    names = ("status", "failure", "updates", "wall_seconds", "reward_eval", "reward_mean",
             "ledger", "recovery", "age", "reuse")  # fmt: skip
    return {name: summary[name] for name in names}


def _print(record: dict[str, Any]) -> None:
    print(f"killed: {record['killed']}")
    for name in ("disturbed", "undisturbed"):
        run = record[name]
        retired = {reason: n for reason, n in run["ledger"]["retired"].items() if n}
        print(
            f"{name}: {run['status']}, {run['updates']} updates in {run['wall_seconds']:.0f} s, "
            f"reward_eval {run['reward_eval']:.3f}, issued {run['ledger']['issued']:,}, "
            f"retired {retired}, age ≤ {run['age']['max']}, reuse ≤ {run['reuse']['max']}, "
            f"{run['recovery']['restarts']}, lineage {run['recovery']['lineage']}"
        )
