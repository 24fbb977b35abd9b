"""Advantages from a value head, its loss, and the KL terms: against NumPy loops."""

import numpy as np
import pytest
import torch

from configs.choices import Advantage, Ratio
from configs.schema import ObjectiveConfig
from configs.schema_value import ValueConfig
from learner.divergence import kl_to_reference
from learner.kl_control import adapted
from learner.objectives import load
from learner.objectives.base import LossInputs
from learner.objectives.gae import gae, moments, token_rewards, value_losses, whitened
from learner.objectives.terms import reference_kl, whole_loss
from tests.unit.objective_reference import columns, inputs

torch.set_num_threads(1)
GAMMA, LAM, BETA, EPSILON = 0.9, 0.8, 0.3, 0.2


def case() -> dict[str, np.ndarray]:
    """The objectives' case data, NaN beneath the mask, with values and returns besides."""
    c, draw = columns(), np.random.default_rng(3)
    for name in ("value_NL", "first_value_NL", "return_NL"):
        c[name] = np.where(c["mask_NL"], draw.normal(0, 0.5, c["mask_NL"].shape), np.nan)
    return c


def t(column: np.ndarray) -> torch.Tensor:
    return torch.tensor(column)


def rewards_reference(c: dict[str, np.ndarray], kl: float) -> np.ndarray:
    out = np.zeros(c["mask_NL"].shape)
    for i in np.flatnonzero(c["valid_N"]):
        length = c["mask_NL"][i].sum()
        for k in range(length):
            out[i, k] = -kl * (c["generator_logp_NL"][i, k] - c["reference_logp_NL"][i, k])
        out[i, length - 1] += c["reward_N"][i]
    return out


def gae_reference(c: dict[str, np.ndarray], reward: np.ndarray) -> np.ndarray:
    """Σ_k (γλ)^k δ_{t+k}, each sum written out."""
    out = np.zeros(reward.shape)
    for i in np.flatnonzero(c["valid_N"]):
        length = c["mask_NL"][i].sum()
        value = [*c["value_NL"][i, :length], 0.0]
        delta = [reward[i, k] + GAMMA * value[k + 1] - value[k] for k in range(length)]
        for k in range(length):
            out[i, k] = sum((GAMMA * LAM) ** (j - k) * delta[j] for j in range(k, length))
    return out


@pytest.mark.parametrize("kl", [0.0, BETA])
def test_rewards_and_advantages_equal_numpy_reference(kl: float) -> None:
    c = case()
    log_ratio = t(c["generator_logp_NL"] - c["reference_logp_NL"])
    reward = token_rewards(t(c["reward_N"]), log_ratio, kl, t(c["mask_NL"]))
    np.testing.assert_allclose(reward, rewards_reference(c, kl), atol=1e-12)
    advantage = gae(reward, t(c["value_NL"]), t(c["mask_NL"]), GAMMA, LAM)
    np.testing.assert_allclose(advantage, gae_reference(c, reward.numpy()), atol=1e-12)
    assert np.abs(advantage.numpy()).max() > 0.1


def test_gae_at_lambda_1_is_the_return_less_the_value_and_at_0_one_step() -> None:
    c = case()
    mask, value = t(c["mask_NL"]), t(c["value_NL"])
    reward = t(rewards_reference(c, BETA))
    to_go = reward.flip(-1).cumsum(-1).flip(-1)
    expected = torch.where(mask, to_go - value, 0.0)
    np.testing.assert_allclose(gae(reward, value, mask, 1.0, 1.0), expected, atol=1e-12)
    one_step = gae(reward, value, mask, 1.0, 0.0)
    i = int(np.flatnonzero(c["valid_N"])[0])
    assert float(one_step[i, 0]) == pytest.approx(float(reward[i, 0] + value[i, 1] - value[i, 0]))


def test_whitening_has_mean_0_and_variance_1_over_parts_together() -> None:
    c = case()
    value, mask = t(c["value_NL"]), t(c["mask_NL"])
    together = moments(value[:5], mask[:5]) + moments(value[5:], mask[5:])
    np.testing.assert_allclose(together, moments(value, mask), rtol=1e-12)
    white = whitened(value, mask, together).numpy()
    kept = white[c["mask_NL"]]
    assert kept.mean() == pytest.approx(0, abs=1e-9) and kept.std(ddof=1) == pytest.approx(1)
    assert not white[~c["mask_NL"]].any()
    raw = c["value_NL"][c["mask_NL"]]
    np.testing.assert_allclose(kept, (raw - raw.mean()) / raw.std(ddof=1), atol=1e-6)


@pytest.mark.parametrize("value", [[[0.7, 0.7]], [[5.0, np.nan]]])
def test_equal_advantages_and_a_single_one_whiten_to_zero(value: list[list[float]]) -> None:
    value_NL = torch.tensor(value)
    mask_NL = ~value_NL.isnan()
    assert whitened(value_NL, mask_NL, moments(value_NL, mask_NL)).abs().max() < 1e-3


def value_reference(c: dict[str, np.ndarray]) -> np.ndarray:
    out = np.zeros(len(c["mask_NL"]))
    for i in np.flatnonzero(c["valid_N"]):
        terms = []
        for k in np.flatnonzero(c["mask_NL"][i]):
            v, first, target = (c[f"{n}_NL"][i, k] for n in ("value", "first_value", "return"))
            near = min(max(v, first - EPSILON), first + EPSILON)
            terms.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
        out[i] = np.mean(terms)
    return out


def test_value_loss_and_its_gradient_equal_the_reference() -> None:
    c, step = case(), 1e-6
    value = t(c["value_NL"]).requires_grad_()
    rest = t(c["first_value_NL"]), t(c["return_NL"]), t(c["mask_NL"]), EPSILON
    losses = value_losses(value, *rest)
    np.testing.assert_allclose(losses.detach(), value_reference(c), rtol=1e-12)
    losses.sum().backward()
    expected = np.zeros(c["mask_NL"].shape)
    for i, k in zip(*np.nonzero(c["mask_NL"]), strict=True):
        ends = []
        for sign in (1, -1):
            moved = {**c, "value_NL": c["value_NL"].copy()}
            moved["value_NL"][i, k] += sign * step
            ends.append(value_reference(moved).sum())
        expected[i, k] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(value.grad, expected, atol=1e-7)
    away = np.abs(c["value_NL"] - c["first_value_NL"])[c["mask_NL"]] > EPSILON
    assert away.any() and not away.all()
    assert (expected[c["mask_NL"]] == 0).any()  # moved towards its return by more than ε


def test_the_whole_loss_is_the_objective_and_its_terms_each_over_its_count() -> None:
    c = case()
    s = ObjectiveConfig(
        "ppo", ratio=Ratio.token, advantage=Advantage.gae, kl_loss=0.4,
        value=ValueConfig(coefficient=0.3, epsilon=EPSILON),
    )  # fmt: skip
    x, ppo = inputs(c), load("ppo")
    whole = whole_loss(ppo, x, s, count=7, rollouts=5).item()
    parts = ppo.loss(x, s).item() / 7 + 0.3 * value_reference(c).sum() / 5
    assert whole == pytest.approx(parts + 0.4 * reference_kl(x).sum().item() / 5, rel=1e-12)
    alone = ObjectiveConfig("ipo", tau=0.4)
    ipo = load("ipo")
    assert whole_loss(ipo, x, alone, 7, 5).item() == pytest.approx(ipo.loss(x, alone).item() / 7)


def test_the_kl_term_is_the_divergence_that_is_measured() -> None:
    c = case()
    x = inputs(c)
    names = ("logp_NL", "generator_logp_NL", "reference_logp_NL", "mask_NL")
    measured_NL = kl_to_reference(*(t(c[name]) for name in names))
    length_N = x.mask_NL.sum(-1).clamp(min=1)
    np.testing.assert_allclose(reference_kl(x), measured_NL.sum(-1) / length_N, atol=1e-12)


def test_the_kl_terms_gradient_is_that_of_the_exact_divergence() -> None:
    """A whole vocabulary as the samples, each weighted by its π_gen: no sampling error."""
    draw = torch.Generator().manual_seed(0)
    theta, gen, ref = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(3))
    gen_V, ref_V = gen.log_softmax(0), ref.log_softmax(0)

    def gradient(loss) -> torch.Tensor:
        logits = theta.clone().requires_grad_()
        loss(logits.log_softmax(0)).backward()
        return logits.grad

    def estimate(logp_V: torch.Tensor) -> torch.Tensor:
        x = LossInputs(
            logp_NL=logp_V[:, None], mask_NL=torch.ones(6, 1, dtype=torch.bool),
            valid_N=torch.ones(6, dtype=torch.bool), members=1,
            generator_logp_NL=gen_V[:, None], reference_logp_NL=ref_V[:, None],
        )  # fmt: skip
        return (gen_V.exp() * reference_kl(x)).sum()

    exact = gradient(lambda logp_V: (logp_V.exp() * (logp_V - ref_V)).sum())
    np.testing.assert_allclose(gradient(estimate), exact, atol=1e-12)
    assert exact.abs().max() > 0.01


def test_the_kl_term_stays_finite_where_the_policy_leaves_a_token() -> None:
    logp = torch.tensor([[-500.0]], requires_grad=True)
    one = torch.full((1, 1), -1.0)
    x = LossInputs(logp, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool), 1,
                   generator_logp_NL=one, reference_logp_NL=one)  # fmt: skip
    loss = reference_kl(x).sum()
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and torch.isfinite(logp.grad).all()


def test_the_controller_moves_towards_its_target_by_at_most_a_fifth() -> None:
    assert adapted(0.2, kl=6.6, target=6.0, rollouts=100, horizon=1000) == pytest.approx(
        0.2 * (1 + 0.1 * 0.1)
    )
    assert adapted(0.2, kl=60.0, target=6.0, rollouts=100, horizon=1000) == pytest.approx(0.204)
    assert adapted(0.2, kl=0.0, target=6.0, rollouts=100, horizon=1000) == pytest.approx(0.196)
