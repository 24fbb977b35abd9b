"""Every objective against NumPy loops, finite differences and, for pairs, numbers by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.objectives import TABLE
from configs.schema import Advantage, ObjectiveConfig, Ratio, RewardScale
from learner.objectives import load
from learner.objectives.base import LossInputs
from learner.signals import signals

torch.set_num_threads(1)

G, C, L = 3, 4, 5
FAILED = (2, 7)
CASES = {
    "ppo sequence": ObjectiveConfig("ppo"),
    "ppo sequence leave_one_out": ObjectiveConfig("ppo", advantage=Advantage.leave_one_out),
    "ppo token": ObjectiveConfig("ppo", ratio=Ratio.token, epsilon=0.3),
    "reinforce": ObjectiveConfig("reinforce"),
    "reinforce leave_one_out": ObjectiveConfig("reinforce", advantage=Advantage.leave_one_out),
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
EACH = pytest.mark.parametrize("case", CASES)


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
    }


def inputs(c: dict[str, np.ndarray], members: int = C) -> LossInputs:
    return LossInputs(members=members, **{k: torch.tensor(v) for k, v in c.items()})


def loss_and_gradient(c: dict[str, np.ndarray], s: ObjectiveConfig) -> tuple[float, np.ndarray]:
    x = inputs(c)
    x.logp_NL.requires_grad_()
    loss = load(s.name).loss(x, s)
    loss.backward()
    return loss.item(), x.logp_NL.grad.numpy()


def reference(c: dict[str, np.ndarray], s: ObjectiveConfig, above: np.ndarray | None) -> float:
    """Every loss as plain loops over rollouts, tokens and pairs; `above`: the frozen gate."""
    valid = np.flatnonzero(c["valid_N"])
    tokens = {i: np.flatnonzero(c["mask_NL"][i]) for i in valid}
    logp = {i: c["logp_NL"][i][tokens[i]] for i in valid}
    lr_gen = {i: logp[i] - c["generator_logp_NL"][i][tokens[i]] for i in valid}
    lr_ref = {i: (logp[i] - c["reference_logp_NL"][i][tokens[i]]).sum() for i in valid}
    loo = s.advantage == Advantage.leave_one_out
    advantage = c["leave_one_out_N" if loo else "standardised_N"]
    standardised = s.reward == RewardScale.standardised
    weight = c["standardised_N" if standardised else "reward_N"]
    pairs = [
        (i, j)
        for i in valid
        for j in valid
        if i // C == j // C and c["score_N"][i] > c["score_N"][j]
    ]

    def clip(ratio: float, i: int) -> float:
        bounded = np.clip(ratio, 1 - s.epsilon, 1 + s.epsilon)
        return -min(ratio * advantage[i], bounded * advantage[i])

    if s.name == "ppo" and s.ratio == Ratio.sequence:
        return sum(clip(math.exp(lr_gen[i].sum()), i) for i in valid)
    if s.name == "ppo":
        return sum(np.mean([clip(math.exp(t), i) for t in lr_gen[i]]) for i in valid)
    if s.name == "reinforce":
        return sum(-logp[i].sum() * advantage[i] for i in valid)
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
        loss += s.beta * sum(logp[i].sum() for i in valid if not c["best_N"][i] and above[i])
    return loss


def gate(c: dict[str, np.ndarray], s: ObjectiveConfig) -> np.ndarray:
    return np.nanmean(np.where(c["valid_N"][:, None], c["logp_NL"], 0), 1) > s.floor


@EACH
def test_value_equals_numpy_reference(case: str) -> None:
    c, s = columns(), CASES[case]
    expected = reference(c, s, gate(c, s))
    assert abs(expected) > 0.1
    assert loss_and_gradient(c, s)[0] == pytest.approx(expected, rel=1e-12)


@EACH
def test_gradient_equals_finite_differences_of_the_reference(case: str) -> None:
    c, s, step = columns(), CASES[case], 1e-6
    above = gate(c, s)  # a gate has no gradient, so it stays where it was
    expected = np.zeros((G * C, L))
    for i, t in zip(*np.nonzero(c["mask_NL"]), strict=True):
        ends = []
        for sign in (1, -1):
            moved = {**c, "logp_NL": c["logp_NL"].copy()}
            moved["logp_NL"][i, t] += sign * step
            ends.append(reference(moved, s, above))
        expected[i, t] = (ends[0] - ends[1]) / (2 * step)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(loss_and_gradient(c, s)[1], expected, atol=1e-7)


def test_the_case_data_reach_both_sides_of_every_branch() -> None:
    c = columns()
    log_ratio = np.where(c["mask_NL"], c["logp_NL"] - c["generator_logp_NL"], 0)
    for ratio, epsilon in ((np.exp(log_ratio.sum(1)), 0.2), (np.exp(log_ratio), 0.3)):
        assert (ratio > 1 + epsilon).any() and (ratio < 1 - epsilon).any()
        assert (np.abs(ratio - 1) < epsilon).any()
    others = c["valid_N"] & ~c["best_N"]
    above = gate(c, CASES["best_of_n_negative"])
    assert above[others].any() and not above[others].all()


@EACH
def test_negative_gradient_column_is_what_gradients_say(case: str) -> None:
    _, gradient = loss_and_gradient(columns(), CASES[case])
    assert (gradient > 1e-9).any() == TABLE[CASES[case].name].negative_gradient
    assert (gradient < -1e-9).any()


def test_every_objective_of_the_table_is_tested_here() -> None:
    assert {s.name for s in CASES.values()} == set(TABLE)


@EACH
def test_failed_members_contribute_neither_value_nor_gradient(case: str) -> None:
    c, s = columns(), CASES[case]
    loss, gradient = loss_and_gradient(c, s)
    assert np.isfinite(gradient).all() and not gradient[~c["mask_NL"]].any()
    for garbage in (0.0, 50.0, np.inf):  # instead of NaN, also where it overflows
        other = {k: v.copy() for k, v in c.items()}
        for i in FAILED:
            for name, column in other.items():
                if column.dtype == bool and name not in ("valid_N", "mask_NL"):
                    column[i] = True
                elif column.dtype != bool:
                    column[i] = garbage
        if case.startswith("best_of_n"):
            other["best_N"] = c["best_N"]
        again, gradient_again = loss_and_gradient(other, s)
        assert again == loss
        np.testing.assert_array_equal(gradient_again, gradient)


@EACH
def test_order_of_groups_and_of_members_does_not_matter(case: str) -> None:
    c, s = columns(), CASES[case]
    loss, gradient = loss_and_gradient(c, s)
    order = np.arange(G * C).reshape(G, C)[[2, 0, 1]][:, [3, 1, 0, 2]].ravel()
    moved, gradient_moved = loss_and_gradient({k: v[order] for k, v in c.items()}, s)
    assert moved == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient_moved, gradient[order], rtol=1e-12)


@EACH
def test_micro_batches_sum_to_the_whole(case: str) -> None:
    c, s = columns(), CASES[case]
    parts = [{k: v[a : a + C] for k, v in c.items()} for a in range(0, G * C, C)]
    total = sum(loss_and_gradient(part, s)[0] for part in parts)
    assert total == pytest.approx(loss_and_gradient(c, s)[0], rel=1e-12)


def hand_pair() -> LossInputs:
    """Winner +0.2 and +0.3 over π_ref, loser −0.5 and +0.2: margin 0.5 − (−0.3) = 0.8."""
    return LossInputs(
        logp_NL=torch.tensor([[-1.0, -0.5], [-2.0, -1.0]], dtype=torch.float64, requires_grad=True),
        reference_logp_NL=torch.tensor([[-1.2, -0.8], [-1.5, -1.2]], dtype=torch.float64),
        mask_NL=torch.ones(2, 2, dtype=torch.bool),
        valid_N=torch.ones(2, dtype=torch.bool),
        members=2,
        score_N=torch.tensor([0.9, 0.1]),
    )


def test_dpo_by_hand() -> None:
    x = hand_pair()
    loss = load("dpo").loss(x, ObjectiveConfig("dpo", beta=0.5))
    loss.backward()
    assert loss.item() == pytest.approx(0.5130152524, abs=1e-9)  # log(1 + e^−0.4)
    push = 0.5 * 0.4013123399  # β·σ(−0.4)
    np.testing.assert_allclose(x.logp_NL.grad, [[-push, -push], [push, push]], atol=1e-9)


def test_ipo_by_hand() -> None:
    x = hand_pair()
    loss = load("ipo").loss(x, ObjectiveConfig("ipo", tau=0.5))
    loss.backward()
    assert loss.item() == pytest.approx(0.04, abs=1e-12)  # (0.8 − 1)²
    np.testing.assert_allclose(x.logp_NL.grad, [[-0.4, -0.4], [0.4, 0.4]], atol=1e-12)


def test_ppo_has_zero_and_not_nan_gradient_where_a_clipped_ratio_overflows() -> None:
    x = hand_pair()
    x.generator_logp_NL = x.logp_NL.detach() - 1000.0
    x.standardised_N = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss = load("ppo").loss(x, ObjectiveConfig("ppo", epsilon=0.2))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2)
    assert not x.logp_NL.grad.any()


def test_equal_scores_make_no_pairs() -> None:
    x = replace(hand_pair(), score_N=torch.tensor([0.5, 0.5]))
    for name in ("dpo", "ipo", "pref_ft"):
        assert load(name).loss(x, ObjectiveConfig(name)).item() == 0


def test_a_missing_column_and_an_unknown_name_are_named() -> None:
    with pytest.raises(ValueError, match="generator_logp_NL"):
        load("ppo").loss(replace(hand_pair(), standardised_N=torch.ones(2)), ObjectiveConfig("ppo"))
    with pytest.raises(ValueError, match="did you mean best_of_n"):
        load("best_of")


@EACH
def test_rows_of_signals_feed_losses_that_sum_to_the_whole(case: str) -> None:
    c, s = columns(), CASES[case]
    reward, good, valid = c["reward_N"], c["good_N"].astype(np.int8), c["valid_N"]
    whole = signals(reward, good, valid, C, reward, ObjectiveConfig(), progress=0.25)
    expected, _ = loss_and_gradient(c, s)

    def loss(a: int, b: int) -> float:
        logp = {k: torch.tensor(c[k][a:b]) for k in c if k.endswith("logp_NL")}
        mask = torch.ones(b - a, L, dtype=torch.bool) & ~logp["logp_NL"].isnan()
        return load(s.name).loss(whole.rows(a, b).loss_inputs(mask_NL=mask, **logp), s).item()

    assert loss(0, C) + loss(C, G * C) == pytest.approx(expected, rel=1e-5)
