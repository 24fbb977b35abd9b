"""`python -m cluster label`: preference pairs from responses and a reward.

The responses are those of `data.path`; without one, `rollout.responses_per_prompt` are sampled from
the policy at `policy.path` to each of `data.prompts` prompts. A pair prefers the response with the
higher reward; two of equal reward make none, and are counted. Everything runs in this process.

`preferences.jsonl` has a pair a line: prompt_ids, chosen_ids, rejected_ids, chosen_reward,
rejected_reward and, where the policy has a tokenizer, their texts as prompt, chosen, rejected.
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.actor import score
from actors.encoding import TextEncoder
from actors.engine import Request
from actors.preferences import read, to_rollouts
from actors.rollout import UNLABELLED, VALID, GroupId, Rollouts, Version
from actors.row_limits import RowCounts
from actors.tables import write_jsonl
from cluster import inputs
from cluster.run_directory import RunDirectory, claim
from configs.choices import Pairs
from configs.load import prepare, preset_name, to_yaml
from configs.schema import Config, RewardConfig
from reward_server import rewards

ROWS = 256  # responses that are sampled, and scored, at once
OUTPUT = "preferences.jsonl"


@dataclass
class Labelled:
    """The pairs of all groups. failures: responses without a reward, with the first reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)  # tokens, end token included
    compared: int = 0
    ties: int = 0
    failures: int = 0
    why: str = ""


def main(preset: str, settings: list[str]) -> int:
    """Label under `run.dir`, and print what came of it. ConfigError or ValueError for bad input."""
    config = prepare(preset, settings)
    directory = claim(config, f"{preset_name(preset)}-label").path
    print("\n".join(page(label(config, directory), directory)))
    return 0


def label(config: Config, directory: Path, reward: RewardConfig | None = None) -> dict[str, Any]:
    """Label in a directory; returns what its summary.json holds. A finished one is left as it is.

    reward: that labels; None: `config.reward`. Raises ValueError in one line where an input cannot
    be used, where rewards fail more often than `limits.failure_rate`, or no pair comes out.
    """
    started, reward = time.monotonic(), reward or config.reward
    run = RunDirectory(directory)
    if run.summary.exists():  # appears last, and whole
        return json.loads(run.summary.read_text(encoding="utf-8"))
    scorer, encoder = rewards.InProcess(reward), inputs.text_encoder(config)
    counts = RowCounts()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    labelled = _pairs(config, _blocks(config, encoder, counts), scorer, encoder)
    _refuse(config, labelled)
    write_jsonl(directory / OUTPUT, labelled.rows)
    summary = {
        "status": "finished",
        "name": directory.name,
        "scorer": scorer.identity,
        "outputs": {"preferences": str(directory / OUTPUT)},
        "source": config.data.path or "policy",
        "data": counts.record() if config.data.path else None,
        "wall_seconds": time.monotonic() - started,
    } | _statistics(labelled)
    run.write_summary(summary)
    return summary


def page(summary: dict[str, Any], directory: Path) -> list[str]:
    """What a person sees of a summary."""
    reward, length = summary["reward"], summary["response_tokens"]
    return [
        f"{summary['pairs']} pairs of {summary['compared']} by {summary['scorer']}; "
        f"dropped: {summary['ties']} of equal reward; {summary['failures']} responses failed",
        f"reward {reward['mean']:.4g} ± {reward['deviation']:.2g}, from {reward['min']:.4g} to "
        f"{reward['max']:.4g}; preferred {reward['chosen']:.4g}, other {reward['rejected']:.4g}",
        f"tokens {length['mean']:.4g}; preferred {length['chosen']:.4g}, "
        f"other {length['rejected']:.4g}",
        f"pairs: {directory}/{OUTPUT}",
    ]


def _blocks(config: Config, encoder: TextEncoder | None, counts: RowCounts) -> Iterator[Rollouts]:
    """The responses, some groups at a time, without rewards."""
    return _from_data(config, encoder, counts) if config.data.path else _sampled(config)


def _from_data(
    config: Config, encoder: TextEncoder | None, counts: RowCounts
) -> Iterator[Rollouts]:
    """The data set's groups. What it says of rewards does not count."""
    vocabulary, longest = inputs.limits(config)
    limit = config.rollout.max_tokens
    groups = read(config.data.path, None, vocabulary, longest, limit, encoder, config.data, counts)
    step = max(1, ROWS // len(groups[0].responses))
    for start in range(0, len(groups), step):
        rows = range(start, min(start + step, len(groups)))
        block = to_rollouts([groups[row] for row in rows], rows, [0] * len(rows), rows)
        block.reward_N[:] = np.nan
        block.label_N[:] = UNLABELLED
        yield block


def _sampled(config: Config) -> Iterator[Rollouts]:
    """Fresh groups of the policy."""
    from actors.torch_engine import TorchEngine
    from cluster.reference import reference_weights

    prompts = inputs.prompts(config)
    engine = TorchEngine(config)
    engine.load(reference_weights(config), Version(0, 0))
    step = max(1, ROWS // config.rollout.responses_per_prompt)
    for start in range(0, config.data.prompts, step):
        positions = range(start, min(start + step, config.data.prompts))
        requests = [Request(GroupId(p, 0), prompts[p]) for p in positions]
        yield engine.generate(requests, "label")


def _pairs(
    config: Config, blocks: Iterator[Rollouts], scorer: rewards.InProcess,
    encoder: TextEncoder | None,
) -> Labelled:  # fmt: skip
    out = Labelled()
    for block in blocks:
        score(block, scorer, config.limits.wait_seconds)
        valid_N = block.status_N == VALID
        out.rewards.append(block.reward_N[valid_N].astype(np.float64))
        out.lengths.append(block.length_N[valid_N])
        out.failures += int((~valid_N).sum())
        out.why = out.why or next(iter(block.failures.values()), "")
        for group in range(block.groups):
            _pair_up(block, group, config.data.pairs, encoder, out)
    return out


def _pair_up(
    block: Rollouts, group: int, which: Pairs, encoder: TextEncoder | None, out: Labelled
) -> None:
    """Add a group's pairs."""
    members = range(group * block.members, (group + 1) * block.members)
    disjoint = zip(members[::2], members[1::2])
    for one, other in disjoint if which is Pairs.disjoint else itertools.combinations(members, 2):
        if block.status_N[one] != VALID or block.status_N[other] != VALID:
            continue
        out.compared += 1
        if block.reward_N[one] == block.reward_N[other]:
            out.ties += 1
            continue
        better = block.reward_N[one] > block.reward_N[other]
        chosen, rejected = (one, other) if better else (other, one)
        out.rows.append(_row(block, group, chosen, rejected, encoder))


def _row(
    block: Rollouts, group: int, chosen: int, rejected: int, encoder: TextEncoder | None
) -> dict[str, Any]:
    ids = {
        "prompt": block.prompt(group).tolist(),
        "chosen": block.response(chosen).tolist(),
        "rejected": block.response(rejected).tolist(),
    }
    texts = {} if encoder is None else {name: encoder.text(value) for name, value in ids.items()}
    return {
        **texts,
        **{f"{name}_ids": value for name, value in ids.items()},
        "chosen_reward": float(block.reward_N[chosen]),
        "rejected_reward": float(block.reward_N[rejected]),
    }


def _refuse(config: Config, labelled: Labelled) -> None:
    """ValueError where rewards failed too often, or no two differ."""
    scored = sum(map(len, labelled.rewards))
    total = scored + labelled.failures
    if not scored or labelled.failures > config.limits.failure_rate * total:
        raise ValueError(f"{labelled.failures} of {total} responses failed: {labelled.why}")
    if not labelled.compared:
        raise ValueError(
            "no two responses to a prompt could be compared; "
            "set rollout.responses_per_prompt=2 or give data with two or more to a prompt"
        )
    if not labelled.rows:
        raise ValueError(f"all {labelled.compared} pairs have equal rewards, so none is preferred")


def _statistics(labelled: Labelled) -> dict[str, Any]:
    reward_N, length_N = map(np.concatenate, (labelled.rewards, labelled.lengths))
    rows = labelled.rows
    pair = {name: [row[f"{name}_reward"] for row in rows] for name in ("chosen", "rejected")}
    tokens = {name: [len(row[f"{name}_ids"]) for row in rows] for name in ("chosen", "rejected")}
    return {
        "responses": len(reward_N),
        "failures": labelled.failures,
        "compared": labelled.compared,
        "ties": labelled.ties,
        "pairs": len(rows),
        "reward": {
            "mean": float(reward_N.mean()),
            "deviation": float(reward_N.std()),
            "min": float(reward_N.min()),
            "max": float(reward_N.max()),
        }
        | {name: float(np.mean(values)) for name, values in pair.items()},
        "response_tokens": {"mean": float(length_N.mean())}
        | {name: float(np.mean(values)) for name, values in tokens.items()},
    }
