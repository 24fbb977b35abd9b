"""Case data and settings for the objectives, and their losses as NumPy loops."""

import math

import numpy as np
import torch

from configs.choices import Advantage, Importance, Proximal, Ratio, RewardScale
from configs.schema import ObjectiveConfig
from learner.objectives import load
from learner.objectives.base import LossInputs

G, C, L = 3, 4, 5
DECOUPLED = Proximal.first_use
FAILED = (2, 7)
CASES = {
    "ppo sequence": ObjectiveConfig("ppo"),
    "ppo sequence leave_one_out": ObjectiveConfig("ppo", advantage=Advantage.leave_one_out),
    "ppo token": ObjectiveConfig("ppo", ratio=Ratio.token, epsilon=0.3),
    "ppo sequence masked": ObjectiveConfig("ppo", mask_ratio=1.1),
    "ppo decoupled sequence": ObjectiveConfig("ppo", proximal=DECOUPLED),
    "ppo decoupled sequence capped": ObjectiveConfig("ppo", proximal=DECOUPLED, importance_cap=1.1),
    "ppo decoupled token": ObjectiveConfig("ppo", ratio=Ratio.token, proximal=DECOUPLED),
    "ppo decoupled token capped masked": ObjectiveConfig(
        "ppo",
        ratio=Ratio.token,
        epsilon=0.3,
        proximal=DECOUPLED,
        importance_cap=1.1,
        mask_ratio=1.1,
    ),
    "reinforce": ObjectiveConfig("reinforce"),
    "reinforce sequence": ObjectiveConfig("reinforce", importance=Importance.sequence),
    "reinforce sequence capped": ObjectiveConfig(
        "reinforce", importance=Importance.sequence, importance_cap=1.1
    ),
    "reinforce token": ObjectiveConfig("reinforce", importance=Importance.token),
    "reinforce token capped masked": ObjectiveConfig(
        "reinforce", importance=Importance.token, importance_cap=1.1, mask_ratio=1.1
    ),
    "reinforce leave_one_out": ObjectiveConfig("reinforce", advantage=Advantage.leave_one_out),
    "ppo gae": ObjectiveConfig("ppo", ratio=Ratio.token, advantage=Advantage.gae),
    "ppo gae decoupled capped masked": ObjectiveConfig(
        "ppo",
        ratio=Ratio.token,
        epsilon=0.3,
        advantage=Advantage.gae,
        proximal=DECOUPLED,
        importance_cap=1.1,
        mask_ratio=1.1,
    ),
    "reinforce gae": ObjectiveConfig("reinforce", advantage=Advantage.gae),
    "reinforce gae sequence": ObjectiveConfig(
        "reinforce", advantage=Advantage.gae, importance=Importance.sequence
    ),
    "rwr raw": ObjectiveConfig("rwr", beta=0.3),
    "rwr standardised": ObjectiveConfig("rwr", beta=1.5, reward=RewardScale.standardised),
    "best_of_n": ObjectiveConfig("best_of_n"),
    "best_of_n_negative": ObjectiveConfig("best_of_n_negative", beta=0.2, floor=-1.5),
    "rest": ObjectiveConfig("rest"),
    "dpo": ObjectiveConfig("dpo", beta=0.5),
    "ipo": ObjectiveConfig("ipo", tau=0.4),
    "pref_ft": ObjectiveConfig("pref_ft"),
    "binary_feedme": ObjectiveConfig("binary_feedme"),
}


def columns() -> dict[str, np.ndarray]:
    """A minibatch with failed members, ties, padding, and NaN beneath every mask, in NumPy."""
    draw = np.random.default_rng(7)
    valid = np.ones(G * C, dtype=bool)
    valid[list(FAILED)] = False
    length = draw.integers(1, L + 1, G * C)
    mask = (np.arange(L) < length[:, None]) & valid[:, None]
    logp = -draw.uniform(0.2, 3.0, (G * C, L))
    reward = draw.uniform(0, 1, G * C)
    reward[5] = reward[4]  # a tie: no pair of these two
    reward[~valid] = np.nan
    known = reward[valid]
    others = [
        [reward[j] for j in range(i // C * C, i // C * C + C) if j != i and valid[j]]
        for i in range(G * C)
    ]
    first = [min(np.flatnonzero(g == np.nanmax(g))) for g in reward.reshape(G, C)]
    return {
        "logp_NL": np.where(mask, logp, np.nan),
        "mask_NL": mask,
        "valid_N": valid,
        "generator_logp_NL": np.where(mask, logp + draw.normal(0, 0.2, (G * C, L)), np.nan),
        "reference_logp_NL": np.where(mask, logp + draw.normal(0, 0.5, (G * C, L)), np.nan),
        "reward_N": reward,
        "standardised_N": (reward - known.mean()) / known.std(ddof=1),
        "leave_one_out_N": reward - np.array([np.mean(o) for o in others]),
        "best_N": np.array([i % C == first[i // C] for i in range(G * C)]),
        "good_N": valid & (draw.uniform(size=G * C) < 0.5),
        "selected_N": reward >= np.quantile(known, 0.6),
        "score_N": reward,
        "proximal_logp_NL": np.where(mask, logp + draw.normal(0, 0.2, (G * C, L)), np.nan),
        "advantage_NL": np.where(mask, draw.normal(0, 1, (G * C, L)), np.nan),
    }


def inputs(c: dict[str, np.ndarray], members: int = C) -> LossInputs:
    return LossInputs(members=members, **{k: torch.tensor(v) for k, v in c.items()})


def loss_and_gradient(c: dict[str, np.ndarray], s: ObjectiveConfig) -> tuple[float, np.ndarray]:
    x = inputs(c)
    x.logp_NL.requires_grad_()
    loss = load(s.name).loss(x, s)
    loss.backward()
    return loss.item(), x.logp_NL.grad.numpy()


def reference(c: dict[str, np.ndarray], s: ObjectiveConfig, frozen: dict[str, np.ndarray]) -> float:
    """Every loss as plain loops over rollouts, tokens and pairs; gates and weights, which have no
    gradient, are of the `frozen` columns."""
    if s.name in ("ppo", "reinforce"):
        return policy_gradient(c, s, frozen)
    valid = np.flatnonzero(c["valid_N"])
    tokens = {i: np.flatnonzero(c["mask_NL"][i]) for i in valid}
    logp = {i: c["logp_NL"][i][tokens[i]] for i in valid}
    lr_ref = {i: (logp[i] - c["reference_logp_NL"][i][tokens[i]]).sum() for i in valid}
    standardised = s.reward == RewardScale.standardised
    weight = c["standardised_N" if standardised else "reward_N"]
    pairs = [
        (i, j)
        for i in valid
        for j in valid
        if i // C == j // C and c["score_N"][i] > c["score_N"][j]
    ]
    if s.name == "rwr":
        return sum(-logp[i].sum() * math.exp(weight[i] / s.beta) for i in valid)
    if s.name == "dpo":
        return sum(math.log1p(math.exp(-s.beta * (lr_ref[i] - lr_ref[j]))) for i, j in pairs)
    if s.name == "ipo":
        return sum((lr_ref[i] - lr_ref[j] - 1 / (2 * s.tau)) ** 2 for i, j in pairs)
    if s.name == "pref_ft":
        return sum(-logp[i].sum() for i, _ in pairs)
    chosen = {"rest": "selected_N", "binary_feedme": "good_N"}.get(s.name, "best_N")
    loss = sum(-logp[i].sum() for i in valid if c[chosen][i])
    if s.name == "best_of_n_negative":
        above = gate(frozen, s)
        loss += s.beta * sum(logp[i].sum() for i in valid if not c["best_N"][i] and above[i])
    return loss


def policy_gradient(
    c: dict[str, np.ndarray], s: ObjectiveConfig, frozen: dict[str, np.ndarray]
) -> float:
    """PPO and REINFORCE, as `reference`."""
    decoupled, cap = s.proximal == DECOUPLED, s.importance_cap or math.inf
    proximal = c["proximal_logp_NL" if decoupled else "generator_logp_NL"]
    weighted = frozen["proximal_logp_NL" if decoupled else "logp_NL"]
    gae = s.advantage == Advantage.gae
    loo = s.advantage == Advantage.leave_one_out
    of_rollout = c["leave_one_out_N" if loo else "standardised_N"]

    def truncated(log_weight: float) -> float:
        return min(math.exp(log_weight), cap)

    def clip(log_ratio: float, log_weight: float, advantage: float) -> float:
        ratio, weight = math.exp(log_ratio), truncated(log_weight) if decoupled else 1
        bounded = np.clip(ratio, 1 - s.epsilon, 1 + s.epsilon)
        return -weight * min(ratio * advantage, bounded * advantage)

    loss = 0.0
    for i in np.flatnonzero(c["valid_N"]):
        tokens = np.flatnonzero(c["mask_NL"][i])
        logp = c["logp_NL"][i][tokens]
        log_ratio = logp - proximal[i][tokens]
        log_weight = weighted[i][tokens] - c["generator_logp_NL"][i][tokens]
        if not unmasked(frozen, s, i):
            continue
        advantage = c["advantage_NL"][i][tokens] if gae else np.full(len(tokens), of_rollout[i])
        if s.name == "ppo" and s.ratio == Ratio.sequence:
            loss += clip(log_ratio.sum(), log_weight.sum(), of_rollout[i])
        elif s.name == "ppo":
            loss += np.mean([clip(*each) for each in zip(log_ratio, log_weight, advantage)])
        elif s.importance == Importance.sequence:
            loss -= truncated(log_weight.sum()) * (logp * advantage).sum()
        elif s.importance == Importance.token:
            loss -= sum(truncated(w) * t * a for w, t, a in zip(log_weight, logp, advantage))
        else:
            loss -= (logp * advantage).sum()
    return loss


def gate(c: dict[str, np.ndarray], s: ObjectiveConfig) -> np.ndarray:
    return np.nanmean(np.where(c["valid_N"][:, None], c["logp_NL"], 0), 1) > s.floor


def unmasked(c: dict[str, np.ndarray], s: ObjectiveConfig, i: int) -> bool:
    """Whether rollout i is within `mask_ratio`: the geometric mean of π_θ/π_gen over its tokens."""
    if s.mask_ratio is None:
        return True
    tokens = np.flatnonzero(c["mask_NL"][i])
    ratios = np.exp(c["logp_NL"][i][tokens] - c["generator_logp_NL"][i][tokens])
    return 1 / s.mask_ratio <= np.prod(ratios) ** (1 / len(tokens)) <= s.mask_ratio
