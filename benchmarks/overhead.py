"""What the system around the learner costs: the bandit's updates through Ray, queue, reward service
and metrics, beside the same updates in a bare single-process loop (plain torch, no Ray, no
measures).

Both do Algorithm 1 with the preset's B, C, M, T and the same keyed draws; the loop has nothing but
sampling, reward, IPO and Adam. They run alternately; the ratio of their rates is what counts.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from actors import policy
from actors.engine import Request
from actors.rollout import GroupId, Version
from actors.torch_engine import TorchEngine
from cluster import connection, inputs
from cluster.train import train
from configs.load import prepare
from configs.schema import Config
from learner.batch import conditionals, pad, token_logps
from learner.objectives import load as load_objective
from learner.signals import signals
from learner.stages.bandit import initial_policy
from reward_server.rewards import load as load_reward
from reward_server.rewards import score_safely

PAIRS = 3
UPDATES = 500


class BareLoop:
    """Algorithm 1 with one network, one optimizer and nothing around them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        path = initial_policy(config)
        load = policy.load_pretrained
        self.model = load(config.policy, path, config.learner.precision)
        self.reference = load(config.policy, path, config.learner.precision).eval()
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learner.lr)
        self.engine = TorchEngine(config)
        self.prompts = inputs.prompts(config)
        self.reward = load_reward(config.reward)
        self.objective = load_objective(config.objective.name)

    def run(self, updates: int) -> float:
        """Seconds for so many updates."""
        torch.set_num_threads(1)
        started = time.perf_counter()
        steps = self.config.steps_per_round
        for round_ in range(updates // steps):
            self.engine.load(policy.flatten(self.model), Version(0, round_ * steps))
            self._round(round_)
        return time.perf_counter() - started

    def _round(self, round_: int) -> None:
        groups = self.config.groups_per_round
        places = range(round_ * groups, (round_ + 1) * groups)
        requests = [Request(GroupId(p, 0), self.prompts[p]) for p in places]
        block = self.engine.generate(requests, "rollout")
        asked = [block.prompt(n // block.members).tolist() for n in range(len(block.reward_N))]
        answers = [block.response(n).tolist() for n in range(len(block.reward_N))]
        block.reward_N[:] = score_safely(self.reward, asked, answers).reward
        whole, m = pad(block), self.config.learner.minibatch
        with torch.no_grad():
            reference_NL = token_logps(conditionals(self.reference, whole), whole)
        for update in range(self.config.steps_per_round):
            start = update * m % len(block.reward_N)
            part = whole.rows(start, start + m)
            notes = signals(
                block.reward_N[start : start + m], block.label_N[start : start + m],
                block.status_N[start : start + m] == 0, block.members, block.reward_N,
                self.config.objective, 0.0,
            )  # fmt: skip
            logp_NL = token_logps(conditionals(self.model, part), part)
            given = notes.loss_inputs(
                logp_NL, part.mask_NL, part.logp_NL, reference_NL[start : start + m]
            )
            count = max(1, notes.count(self.objective.traits.per))
            self.optimizer.zero_grad()
            (self.objective.loss(given, self.config.objective) / count).backward()
            self.optimizer.step()


def main(overrides: list[str]) -> None:
    """Print the ratio of rates, its spread, and where the rest of an update's time goes."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        config = prepare("bandit", [f"learner.updates={UPDATES}", f"run.dir={folder}", *overrides])
        BareLoop(config).run(2 * config.steps_per_round)  # warm-up
        with connection.connected(config.cluster):
            for pair in range(PAIRS):
                bare = BareLoop(config).run(UPDATES)
                summary = train(config, "overhead")
                results.append(_row(pair, bare, summary))
    print(_table(results))
    ratios = [row["ratio"] for row in results]
    print(
        f"overhead: rate of the system / rate of the bare loop = {statistics.median(ratios):.2f} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f}, {PAIRS} pairs of {UPDATES} updates)"
    )
    target = Path("runs/bench")
    target.mkdir(parents=True, exist_ok=True)
    (target / "overhead.json").write_text(json.dumps(results, indent=2) + "\n")


def _row(pair: int, bare_seconds: float, summary: dict[str, Any]) -> dict[str, Any]:
    if summary["status"] != "finished":
        raise RuntimeError(f"the run ended as {summary['status']}: {summary['failure']}")
    system, bare = summary["train_seconds"] / UPDATES, bare_seconds / UPDATES
    parts = summary["seconds_per_update"]
    return {
        "pair": pair,
        "bare_ms": 1e3 * bare,
        "system_ms": 1e3 * system,
        "ratio": bare / system,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()},
        "driver_ms": 1e3 * (system - sum(parts.values())),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["  ".join(f"{name:>12}" for name in names)]
    for row in rows:
        lines.append("  ".join(f"{row[name]:>12.2f}" for name in names))
    meaning = (
        "per update: wait: for a batch (generation, score and queue of a lockstep round in it); "
        "step: forward, backward, optimizer and measures; publish: reading out and handing over "
        "weights, commit; driver: between calls of the driver"
    )
    return "\n".join([*lines, meaning])
