"""`python -m cluster evaluate RUN`: the trained policy beside π_ref, on the same prompts.

Both policies answer with the same keyed draws, so that what differs is the policies. Scored with
the run's gold reward, or its reward where it has no gold one, in this process.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors import policy
from actors.actor import score
from actors.engine import Request
from actors.rollout import VALID, GroupId, Rollouts, Version, concatenate
from actors.torch_engine import TorchEngine
from cluster import inputs
from cluster.reference import reference_weights
from configs.choices import RewardKind
from configs.load import prepare
from configs.schema import Config
from learner.batch import conditionals, pad, token_logps
from reward_server.rewards import InProcess

ROWS = 512  # responses generated at once
STREAM = "judge"
TARGET = "evaluation.json"


def evaluate(run: Path, settings: list[str]) -> dict[str, Any]:
    """Sample, score and compare; writes RUN/evaluation.json and returns it.

    settings: `samples=1000` responses of each policy, and overrides of the run's settings, such as
    `gold.kind=…`. ValueError in one line where the run has no exported policy.
    """
    samples, rest = _own_settings(settings)
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run}: no run is there; name a run's directory, as runs/NAME")
    config, exported = prepare(str(run / "config.yaml"), rest), _exported(run)
    config = replace(config, cluster=replace(config.cluster, address=""))
    gold = config.gold if config.gold.kind is not RewardKind.none else config.reward
    judge = InProcess(gold)
    engine = TorchEngine(config)
    requests = _requests(config, samples)
    reference, trained = reference_weights(config), _weights(config, str(exported))
    theirs = _answers(engine, reference, requests, judge)
    ours = _answers(engine, trained, requests, judge)
    out = {
        "run": run.name, "policy": exported.parent.name, "samples": len(ours.reward_N),
        "prompts": len({request.prompt.row for request in requests}), "reward": judge.identity,
        **_compared(ours, theirs, engine.end_tokens.tolist()),
        **_kl(engine, reference, ours),
    }  # fmt: skip
    beside = run / f"{TARGET}.part"
    beside.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, run / TARGET)
    return out


def told(out: dict[str, Any]) -> str:
    """An evaluation for people, with standard errors."""
    rows = [
        ("reward", "reward_gold", ".3f"), ("of π_ref", "reward_gold_reference", ".3f"),
        ("wins against π_ref", "win_rate", ".3f"), ("length, tokens", "length", ".1f"),
        ("of π_ref", "length_reference", ".1f"),
        ("KL to π_ref, nats a response", "kl_to_reference_sequence", ".2f"),
    ]  # fmt: skip
    lines = [
        f"{title:30} {format(out[name], form):>8} ± {format(out[f'{name}_error'], form)}"
        for title, name, form in rows
    ]
    head = f"{out['run']}, {out['policy']}: {out['samples']} responses of each policy to "
    return "\n".join([f"{head}{out['prompts']} prompts, scored by {out['reward']}", *lines])


def _own_settings(settings: list[str]) -> tuple[int, list[str]]:
    asked = [text.partition("=")[2] for text in settings if text.startswith("samples=")]
    if asked and not (asked[-1].isascii() and asked[-1].isdigit() and int(asked[-1]) > 1):
        raise ValueError(f"samples={asked[-1]}: not a number of responses; set samples=1000")
    rest = [text for text in settings if not text.startswith("samples=")]
    return int(asked[-1]) if asked else 1000, rest


def _exported(run: Path) -> Path:
    """The newest policy that the run wrote as a model directory."""
    found = list((run / "checkpoints").glob("step-*/hf"))
    if not found:
        raise ValueError(f"{run}: no policy is exported there; a run writes it at its end")
    return max(found, key=lambda path: int(path.parent.name.removeprefix("step-")))


def _requests(config: Config, samples: int) -> list[Request]:
    """Prompts in the data's order, from the first on, as often as it takes."""
    stream = inputs.prompts(config)
    groups = -(-samples // config.rollout.responses_per_prompt)
    return [Request(GroupId(p, 0), stream[p]) for p in range(groups)]


def _weights(config: Config, path: str) -> np.ndarray:
    return policy.flatten(policy.load_pretrained(config.policy, path, config.learner.precision))


def _answers(
    engine: TorchEngine, weights: np.ndarray, requests: list[Request], judge: InProcess
) -> Rollouts:
    """Scored responses under these weights."""
    engine.load(weights, Version(0, 0))
    at_once = max(1, ROWS // engine.config.rollout.responses_per_prompt)
    parts = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
    block = concatenate([engine.generate(part, STREAM) for part in parts])
    score(block, judge, 0.0)
    return block


def _compared(ours: Rollouts, theirs: Rollouts, ends: list[int]) -> dict[str, Any]:
    """Reward and length of both, and how often ours has more reward than theirs; ties count half.

    Means over the rollouts that both have scored, with standard errors over them.
    """
    both_N = (ours.status_N == VALID) & (theirs.status_N == VALID)
    if not both_N.any():
        why = next(iter([*ours.failures.values(), *theirs.failures.values()]), "no reason stated")
        raise ValueError(f"no response could be scored: {why}")
    mine_N, other_N = ours.reward_N[both_N].astype(float), theirs.reward_N[both_N].astype(float)
    won_N = (mine_N > other_N) + 0.5 * (mine_N == other_N)
    lengths = {"length": _words(ours, ends)[both_N],
               "length_reference": _words(theirs, ends)[both_N]}  # fmt: skip
    columns = {
        "reward_gold": mine_N, "reward_gold_reference": other_N, "win_rate": won_N, **lengths,
    }  # fmt: skip
    out: dict[str, Any] = {}
    for name, column_N in columns.items():
        out[name] = float(column_N.mean())
        out[f"{name}_error"] = float(column_N.std() / np.sqrt(len(column_N)))
    out["truncated_fraction"] = float(ours.truncated_N[both_N].mean())
    out["failures"] = int((~both_N).sum())
    return out


def _words(block: Rollouts, ends: list[int]) -> np.ndarray:
    """Tokens of each response before its end token, [N]."""
    ended = [len(r) > 0 and r[-1] in ends for r in map(block.response, range(len(block.reward_N)))]
    return block.length_N - np.array(ended, dtype=np.int64)


@torch.inference_mode()
def _kl(engine: TorchEngine, reference: np.ndarray, ours: Rollouts) -> dict[str, float]:
    """KL(π_θ‖π_ref) in nats, of whole responses and per token: mean log π_θ/π_ref of π_θ's own
    samples."""
    policy.unflatten(engine.model, reference)
    log_ratio_N = []
    step = max(1, ROWS // ours.members)
    for start in range(0, ours.groups, step):
        batch = pad(ours.select(start, min(start + step, ours.groups)), engine.device)
        reference_NL = token_logps(conditionals(engine.model, batch), batch)
        log_ratio_N.append(torch.where(batch.mask_NL, batch.logp_NL - reference_NL, 0.0).sum(-1))
    sums_N = torch.cat(log_ratio_N).double().cpu().numpy()
    valid_N = ours.status_N == VALID
    error = float(sums_N[valid_N].std() / np.sqrt(valid_N.sum()))
    tokens = max(1, int(ours.length_N[valid_N].sum()))
    return {
        "kl_to_reference_sequence": float(sums_N[valid_N].mean()),
        "kl_to_reference_sequence_error": error,
        "kl_to_reference": float(sums_N[valid_N].sum() / tokens),
    }
