"""Every bandit preset at full length through the whole system, and schedules at several budgets.

Not a race but a record: what each method reaches and how on-policy it was. Finished runs are kept,
so the command goes on where it was interrupted; `docs/runs.md` is its output.
"""

import json
from pathlib import Path
from typing import Any

from cluster import connection
from cluster.train import train
from configs.load import prepare

FOLDER = Path("runs/methods")
ON_POLICY = ("ppo", "reinforce", "rwr", "best_of_n", "best_of_n_negative", "rest", "dpo")
OFFLINE = ("ipo", "rwr", "best_of_n", "pref_ft", "binary_feedme")

RUNS: dict[str, tuple[str, list[str]]] = {
    **{f"bandit seed {seed}": ("bandit", [f"seed={seed}"]) for seed in (0, 1, 2)},
    **{name: (f"bandit_{name}", []) for name in ON_POLICY},
    **{f"offline {name}": (f"offline_{name}", []) for name in OFFLINE},
    "lockstep B=400 M=100 T=2": (
        "bandit_best_of_n",
        ["replay.samples_per_round=400", "replay.inner_epochs=2", "learner.updates=400"],
    ),
    **{
        f"pipelined max_age={age}": (
            "bandit_pipelined",
            [f"replay.max_age={age}", "learner.updates=400"],
        )
        for age in (0, 1, 4, 16)
    },
    "lag 3": (
        "bandit_best_of_n",
        ["replay.lag=3", "replay.inner_epochs=1", "learner.updates=200"],
    ),
    **{
        f"width 64 on {engine}": (
            "bandit_vllm",
            [f"rollout.engine={engine}", "learner.updates=300"],
        )
        for engine in ("torch", "vllm")
    },
}

COLUMNS = (
    "run", "reward_eval", "reached 0.98 at", "updates/s", "ages", "reuse", "kl_to_generator",
    "ess", "engine_mismatch_kl", "expired", "wall_seconds",
)  # fmt: skip


def main(overrides: list[str]) -> None:
    """Run what is not finished yet, one after another in one Ray cluster; print the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    first = prepare("bandit", overrides)
    with connection.connected(first.cluster):
        for name, (preset, settings) in RUNS.items():
            folder = name.replace(" ", "_")
            if not (FOLDER / folder / "summary.json").exists():
                own = [f"run.dir={FOLDER}", f"run.name={folder}", *settings]
                train(prepare(preset, [*own, *overrides]), preset)
    print(table([_row(name) for name in RUNS]))


def _row(name: str) -> dict[str, Any]:
    folder = FOLDER / name.replace(" ", "_")
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reached = [line["step"] for line in lines if line.get("reward_eval", 0.0) >= 0.98]
    ages = sorted(int(age) for age in summary["age"]["histogram"])
    return {
        "run": name,
        "reward_eval": summary["reward_eval"],
        "reached 0.98 at": min(reached, default=None),
        "updates/s": summary["throughput"]["updates_per_s"],
        "ages": f"{ages[0]}–{ages[-1]}" if ages else None,
        "reuse": summary["reuse"]["max"],
        "kl_to_generator": summary["kl_to_generator"],
        "ess": summary["ess"],
        "engine_mismatch_kl": summary["engine_mismatch_kl"],
        "expired": summary["ledger"]["retired"]["expired"],
        "wall_seconds": summary["wall_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; what is absent is a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)
