"""What overlap of generation and training gives: pipelined beside lockstep, at three balances.

Best-of-N on the bandit, B = M, T = 1, `max_age` 2, one actor. Both stages are brought to a wanted
time by extra time in actor and learner (`benchmarks.overlap_work`), of two kinds: with `sleep` it
stands for a GPU and leaves the two cores to the rest of the system; with `work` both stages keep a
core busy, and whatever else the system does comes on top. t_gen and t_learn are those measured in
the lockstep run beside, from lease to put and from batch to commit.

Ideal is max(t_gen, t_learn) a step. The clocks of actor, learner and queue are held against the
run's wall time. At the end the model (`benchmarks.overlap_model`) is held against runs of 1 … 4
actors, and says, as a model, what long-tailed lengths on 128 GPUs would give.
"""

import statistics
import tempfile
from typing import Any

from benchmarks import overlap_model, racing
from benchmarks.outside import own_settings
from benchmarks.overlap_work import KINDS, SlowedCrew
from cluster import connection
from configs.load import prepare

SETTINGS = {"turns": 2, "updates": 24, "unit_ms": 100, "actors": 4}
BALANCES = {"equal": (1.0, 1.0), "generation 3x": (2.0, 2 / 3), "generation 1/3": (2 / 3, 2.0)}
COMMON = ["rollout.actors=1", "eval.every=0", "eval.samples=10", "checkpoint.seconds=0"]
LOCKSTEP = ["replay.schedule=lockstep", "replay.max_age=0"]
PIPELINED = ["replay.schedule=pipelined", "replay.max_age=2"]
LEASES = 5  # of a round, where several actors share it
Row = dict[str, Any]


class Bench:
    """Runs of one benchmark in kept processes."""

    def __init__(self, folder: str, updates: int, rest: list[str]) -> None:
        self.folder, self.updates, self.rest = folder, updates, rest
        self.crew = SlowedCrew()
        self.number = 0

    def run(self, kind: str, lease: float, step: float, settings: list[str]) -> Row:
        """Times of a run, seconds per step, and shares of its wall time. lease, step: seconds more
        of each lease and step."""
        self.crew.kind, self.crew.lease, self.crew.step = kind, max(0.0, lease), max(0.0, step)
        self.number += 1
        given = [*COMMON, f"learner.updates={self.updates}", *settings, *self.rest]
        summary = racing.turn("bandit_pipelined", given, self.crew, self.folder, f"r{self.number}")
        return times(summary, self.updates)


def times(summary: dict[str, Any], updates: int) -> Row:
    """What the clocks say, and what they leave out of the run's wall time."""
    wall, learner = summary["train_seconds"], summary["seconds_per_update"]
    actors = list(summary["actor_seconds"].values())
    busy = [sum(parts.values()) - parts["lease"] for parts in actors]
    actor_all = [sum(parts.values()) for parts in actors]
    waited = [parts["lease"] for parts in actors]
    return {
        "wall": wall / updates,
        "t_gen": sum(busy) / (len(actors) * updates),
        "t_learn": learner["step"] + learner["publish"],
        "actor_idle": summary["idle"]["actors"],
        "learner_idle": summary["idle"]["learner"],
        # Shares of wall time that no clock has, and how far two clocks of the same are apart.
        "actor_unaccounted": 1 - statistics.fmean(actor_all) / wall,
        "learner_unaccounted": 1 - updates * sum(learner.values()) / wall,
        "idle_clocks_apart": abs(summary["idle"]["actors"] - sum(waited) / sum(actor_all)),
        "ages": sorted(int(age) for age in summary["age"]["histogram"]),
    }


def main(overrides: list[str]) -> None:
    """Print the ratios, the accounts and the model; write runs/bench/overlap.json."""
    own, rest = own_settings(overrides, SETTINGS, least=1)
    out: dict[str, list[Row]] = {"pairs": [], "model": []}
    ray_up = connection.connected(prepare("bandit_pipelined", rest).cluster)
    with tempfile.TemporaryDirectory() as folder, ray_up:
        bench = Bench(folder, own["updates"], rest)
        try:
            base = bench.run("sleep", 0.0, 0.0, LOCKSTEP)
            base = bench.run("sleep", 0.0, 0.0, LOCKSTEP)  # in processes that are warm
            unit = max(own["unit_ms"] / 1e3, 1.6 * max(base["t_gen"], base["t_learn"]))
            print(f"as they are: generation {1e3 * base['t_gen']:.0f} ms, training "
                  f"{1e3 * base['t_learn']:.0f} ms; "
                  f"unit {1e3 * unit:.0f} ms", flush=True)  # fmt: skip
            for turn in range(own["turns"]):
                for kind in KINDS:
                    for balance in BALANCES:
                        row = _pair(bench, kind, balance, base, unit)
                        out["pairs"].append({"turn": turn, **row})
                        print(_told(row), flush=True)
            out["model"] = _validate(bench, base, unit, own["actors"])
        finally:
            bench.crew.end()
    print(_verdicts(out["pairs"]))
    print(_model_table(out["model"]))
    print("a model, not a measurement: 128 GPUs, log-normal response lengths\n"
          f"{overlap_model.scale_table()}\n{overlap_model.Cluster.__doc__}")  # fmt: skip
    racing.write("overlap", own, rest, out)


def _pair(bench: Bench, kind: str, balance: str, base: Row, unit: float) -> Row:
    generation, training = (unit * share for share in BALANCES[balance])
    more = generation - base["t_gen"], training - base["t_learn"]
    lockstep = bench.run(kind, *more, LOCKSTEP)
    pipelined = bench.run(kind, *more, PIPELINED)
    ideal = max(lockstep["t_gen"], lockstep["t_learn"])
    return {
        "kind": kind, "balance": balance, "lockstep": lockstep, "pipelined": pipelined,
        "speedup": lockstep["wall"] / pipelined["wall"], "of_ideal": ideal / pipelined["wall"],
    }  # fmt: skip


def _told(row: Row) -> str:
    lockstep, pipelined = row["lockstep"], row["pipelined"]
    return (
        f"{row['kind']}, {row['balance']}: generation {1e3 * lockstep['t_gen']:.0f} ms, training "
        f"{1e3 * lockstep['t_learn']:.0f} ms; a step in lockstep {1e3 * lockstep['wall']:.0f} ms, "
        f"pipelined {1e3 * pipelined['wall']:.0f} ms: {row['speedup']:.2f} times as fast, "
        f"{row['of_ideal']:.2f} of the ideal; idle: actor {lockstep['actor_idle']:.0%} and "
        f"{pipelined['actor_idle']:.0%}, learner {lockstep['learner_idle']:.0%} and "
        f"{pipelined['learner_idle']:.0%}"
    )


def _verdicts(rows: list[Row]) -> str:
    lines = []
    for kind in KINDS:
        for balance in BALANCES:
            chosen = [r for r in rows if (r["kind"], r["balance"]) == (kind, balance)]
            name, target = ("speedup", 1.7) if balance == "equal" else ("of_ideal", 0.9)
            values = [row[name] for row in chosen]
            reached = "reached" if statistics.median(values) >= target else "NOT REACHED"
            what = "pipelined over lockstep" if name == "speedup" else "of max(t_gen, t_learn)"
            lines.append(
                f"{kind}, {balance}: {what} {racing.spread(values)}, target {target}: {reached}"
            )
    runs = [row[schedule] for row in rows for schedule in ("lockstep", "pipelined")]
    for name in ("actor_unaccounted", "learner_unaccounted", "idle_clocks_apart"):
        worst = max((run[name] for run in runs), key=abs)
        within = "within" if abs(worst) <= 0.05 else "OVER"
        lines.append(f"{name}: at most {worst:.1%} of wall time, {within} 5%")
    return "\n".join(lines)


def _validate(bench: Bench, base: Row, unit: float, actors: int) -> list[Row]:
    """Runs of 1 … so many actors that share a round's leases, and what the model says of them.

    The stage times are those of the run with one actor in lockstep.
    """
    lease, step = 2 * unit / LEASES, unit
    shared = [f"rollout.lease={10 // LEASES}"]
    more = lease - base["t_gen"] / LEASES, step - base["t_learn"]
    first = bench.run("sleep", *more, [*shared, *LOCKSTEP])
    rows = []
    for count in range(1, actors + 1):
        real = bench.run("sleep", *more, [*shared, *PIPELINED, f"rollout.actors={count}"])
        system = overlap_model.System(
            leases=LEASES, batches=1, actors=count, max_age=2,
            lease=lambda n: first["t_gen"] / LEASES, step=lambda n: first["t_learn"],
            publish=max(0.0, first["wall"] - first["t_gen"] - first["t_learn"]) / 2,
        )  # fmt: skip
        said = overlap_model.simulate(system, bench.updates, warm=0)
        rows.append({
            "actors": count, "step": real["wall"], "model_step": said.step_seconds,
            "actor_idle": real["actor_idle"], "model_actor_idle": said.actor_idle,
            "learner_idle": real["learner_idle"], "model_learner_idle": said.learner_idle,
        })  # fmt: skip
    return rows


def _model_table(rows: list[Row]) -> str:
    lines = ["the model beside real runs (sleep), ms per step and idle shares, real then model:"]
    for row in rows:
        off = row["model_step"] / row["step"] - 1
        lines.append(
            f"  {row['actors']} actors: {1e3 * row['step']:.0f} and {1e3 * row['model_step']:.0f} "
            f"({off:+.0%}); actors idle {row['actor_idle']:.0%} and {row['model_actor_idle']:.0%}; "
            f"learner {row['learner_idle']:.0%} and {row['model_learner_idle']:.0%}"
        )
    return "\n".join(lines)
