"""Every objective against NumPy loops, finite differences and, for pairs, numbers by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.choices import Importance, Ratio
from configs.objectives import TABLE
from configs.schema import ObjectiveConfig
from learner.objectives import load
from learner.objectives.base import LossInputs
from learner.signals import signals
from tests.unit.objective_reference import (
    CASES,
    DECOUPLED,
    FAILED,
    C,
    G,
    L,
    columns,
    gate,
    loss_and_gradient,
    reference,
    unmasked,
)

torch.set_num_threads(1)

EACH = pytest.mark.parametrize("case", CASES)


@EACH
def test_value_equals_numpy_reference(case: str) -> None:
    c, s = columns(), CASES[case]
    expected = reference(c, s, c)
    assert abs(expected) > 0.05
    assert loss_and_gradient(c, s)[0] == pytest.approx(expected, rel=1e-12)


@EACH
def test_gradient_equals_finite_differences_of_the_reference(case: str) -> None:
    c, s, step = columns(), CASES[case], 1e-6
    expected = np.zeros((G * C, L))
    for i, t in zip(*np.nonzero(c["mask_NL"]), strict=True):
        ends = []
        for sign in (1, -1):
            moved = {**c, "logp_NL": c["logp_NL"].copy()}
            moved["logp_NL"][i, t] += sign * step
            ends.append(reference(moved, s, frozen=c))
        expected[i, t] = (ends[0] - ends[1]) / (2 * step)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(loss_and_gradient(c, s)[1], expected, atol=1e-7)


def test_the_case_data_reach_both_sides_of_every_branch() -> None:
    c = columns()

    def log_ratio(of: str, to: str) -> np.ndarray:
        return np.where(c["mask_NL"], c[f"{of}logp_NL"] - c[f"{to}_logp_NL"], 0)

    for column in ("generator", "proximal"):
        log = log_ratio("", column)
        for ratio, epsilon in ((np.exp(log.sum(1)), 0.2), (np.exp(log), 0.3)):
            assert (ratio > 1 + epsilon).any() and (ratio < 1 - epsilon).any()
            assert (np.abs(ratio - 1) < epsilon).any()
    for of in ("", "proximal_"):
        log = log_ratio(of, "generator")
        for ratio in (np.exp(log.sum(1)[c["valid_N"]]), np.exp(log[c["mask_NL"]])):
            assert (ratio > 1.1).any() and (ratio < 1.1).any()
    kept = [unmasked(c, CASES["ppo sequence masked"], i) for i in np.flatnonzero(c["valid_N"])]
    assert any(kept) and not all(kept)
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


@pytest.mark.parametrize("ratio", Ratio)
def test_decoupled_ppo_is_ppo_where_the_generator_is_the_proximal_policy(ratio: Ratio) -> None:
    c = columns()
    c["proximal_logp_NL"] = c["generator_logp_NL"]
    loss, gradient = loss_and_gradient(c, ObjectiveConfig("ppo", ratio=ratio))
    again = loss_and_gradient(c, ObjectiveConfig("ppo", ratio=ratio, proximal=DECOUPLED))
    assert again[0] == loss
    np.testing.assert_array_equal(again[1], gradient)


@pytest.mark.parametrize("importance", [Importance.token, Importance.sequence])
def test_a_capped_weight_is_finite_where_the_ratio_overflows(importance: Importance) -> None:
    x = hand_pair()
    x.generator_logp_NL = x.logp_NL.detach() - 1000.0
    x.standardised_N = torch.tensor([1.0, -1.0], dtype=torch.float64)
    s = ObjectiveConfig("reinforce", importance=importance, importance_cap=2.0)
    loss = load("reinforce").loss(x, s)
    loss.backward()
    assert loss.item() == pytest.approx(2.0 * (1.5 - 3.0))  # 2·(−log π(y_1) + log π(y_2))
    np.testing.assert_allclose(x.logp_NL.grad, [[-2.0, -2.0], [2.0, 2.0]])


def test_all_sequences_beyond_the_mask_ratio_contribute_nothing() -> None:
    x = hand_pair()
    x.generator_logp_NL = x.logp_NL.detach() + torch.tensor([[1000.0], [-1000.0]])
    x.standardised_N = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for name in ("ppo", "reinforce"):
        loss = load(name).loss(x, ObjectiveConfig(name, mask_ratio=2.0))
        loss.backward()
        assert loss.item() == 0 and not x.logp_NL.grad.any()


def test_equal_scores_make_no_pairs() -> None:
    x = replace(hand_pair(), score_N=torch.tensor([0.5, 0.5]))
    for name in ("dpo", "ipo", "pref_ft"):
        assert load(name).loss(x, ObjectiveConfig(name)).item() == 0


def test_a_missing_column_and_an_unknown_name_are_named() -> None:
    with pytest.raises(ValueError, match="generator_logp_NL"):
        load("ppo").loss(replace(hand_pair(), standardised_N=torch.ones(2)), ObjectiveConfig("ppo"))
    with pytest.raises(ValueError, match="proximal_logp_NL"):
        x = replace(hand_pair(), standardised_N=torch.ones(2))
        load("ppo").loss(x, ObjectiveConfig("ppo", proximal=DECOUPLED))
    for setting in ({"importance": Importance.token}, {"mask_ratio": 2.0}):
        with pytest.raises(ValueError, match="generator_logp_NL"):
            load("reinforce").loss(hand_pair(), ObjectiveConfig("reinforce", **setting))
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
        part = whole.take(np.arange(a, b)).loss_inputs(mask_NL=mask, **logp)
        part = replace(part, advantage_NL=torch.tensor(c["advantage_NL"][a:b]))  # the value head's
        return load(s.name).loss(part, s).item()

    assert loss(0, C) + loss(C, G * C) == pytest.approx(expected, rel=1e-5)
