"""Every estimator against exact KL, its expectation taken by enumerating all responses.

Two-step categorical policies: a response is one token (token 0 ends it) or two, so prefixes differ
in how likely each policy makes them, and direction, prefix weights and masks all matter.
"""

import itertools

import numpy as np
import pytest
import torch

from learner import divergence as d

torch.set_num_threads(1)

V = 3
RESPONSES = [(0,), *itertools.product((1, 2), range(V))]
PREFIXES = [(), (1,), (2,)]


class Policy:
    """Next-token probabilities [V] after each prefix."""

    def __init__(self, first: list[float], after_1: list[float], after_2: list[float]) -> None:
        rows = zip(PREFIXES, (first, after_1, after_2), strict=True)
        self.next = {prefix: np.array(p) for prefix, p in rows}

    def p(self, response: tuple[int, ...]) -> float:
        steps = enumerate(response)
        return float(np.prod([self.next[response[:t]][token] for t, token in steps]))


GEN = Policy([0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7])
THETA = Policy([0.3, 0.1, 0.6], [0.5, 0.3, 0.2], [0.5, 0.4, 0.1])
REF = Policy([0.4, 0.4, 0.2], [0.4, 0.3, 0.3], [0.2, 0.1, 0.7])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def sequence_kl(p: Policy, q: Policy) -> float:
    return sum(p.p(y) * np.log(p.p(y) / q.p(y)) for y in RESPONSES)


def per_token_kl(p: Policy, q: Policy, visits: Policy = GEN) -> np.ndarray:
    """Σ over prefixes at step t of P_visits(prefix)·KL(p‖q | prefix), [2]."""
    second = sum(visits.p((a,)) * kl(p.next[(a,)], q.next[(a,)]) for a in (1, 2))
    return np.array([kl(p.next[()], q.next[()]), second])


def sampled(policy: Policy) -> torch.Tensor:
    """Log-probabilities of all responses' tokens, NaN in the padding, [N, 2]."""
    logp = np.full((len(RESPONSES), 2), np.nan)
    for i, y in enumerate(RESPONSES):
        for t, token in enumerate(y):
            logp[i, t] = np.log(policy.next[y[:t]][token])
    return torch.tensor(logp)


def full(policy: Policy) -> torch.Tensor:
    """Log-distributions at all responses' prefixes, NaN in the padding, [N, 2, V]."""
    logp = np.full((len(RESPONSES), 2, V), np.nan)
    for i, y in enumerate(RESPONSES):
        for t in range(len(y)):
            logp[i, t] = np.log(policy.next[y[:t]])
    return torch.tensor(logp)


MASK = torch.tensor([[True, len(y) == 2] for y in RESPONSES])
# Expectations are under π_gen.
WEIGHT = torch.tensor([GEN.p(y) for y in RESPONSES], dtype=torch.float64)


def expected(value: torch.Tensor) -> np.ndarray:
    """E_gen of a per-token [N, 2] or per-sequence [N] estimate."""
    return torch.tensordot(WEIGHT, value.double(), dims=1).numpy()


def test_the_policies_tell_directions_and_prefix_weights_apart() -> None:
    assert WEIGHT.sum().item() == pytest.approx(1)
    assert abs(sequence_kl(THETA, GEN) - sequence_kl(GEN, THETA)) > 0.05
    assert np.abs(per_token_kl(THETA, GEN) - per_token_kl(GEN, THETA)).min() > 0.01
    assert abs(per_token_kl(THETA, GEN).sum() - sequence_kl(THETA, GEN)) > 0.05
    assert abs(per_token_kl(THETA, REF).sum() - sequence_kl(THETA, REF)) > 0.05


@pytest.mark.parametrize(("p", "q"), list(itertools.permutations((GEN, THETA, REF), 2)))
def test_exact_kl_is_that_of_its_first_argument(p: Policy, q: Policy) -> None:
    value = d.exact_kl(full(p), full(q), MASK)
    np.testing.assert_allclose(expected(value), per_token_kl(p, q), rtol=1e-12)
    assert (value[~MASK] == 0).all()


def test_exact_kl_where_support_differs() -> None:
    point, even = torch.tensor([[[1.0, 0.0]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert d.exact_kl(point, even, mask).item() == pytest.approx(np.log(2))
    assert d.exact_kl(even, point, mask).item() == np.inf


def test_kl_from_generator_is_unbiased_per_token() -> None:
    value = d.kl_from_generator(sampled(THETA), sampled(GEN), MASK)
    np.testing.assert_allclose(expected(value), per_token_kl(GEN, THETA), rtol=1e-12)
    assert (value >= 0).all() and (value[~MASK] == 0).all()


def test_kl_to_generator_is_unbiased_per_token() -> None:
    value = d.kl_to_generator(sampled(THETA), sampled(GEN), MASK)
    np.testing.assert_allclose(expected(value), per_token_kl(THETA, GEN), rtol=1e-12)
    assert (value >= 0).all() and (value[~MASK] == 0).all()


def test_kl_to_reference_is_unbiased_per_token_on_the_generators_samples() -> None:
    value = d.kl_to_reference(sampled(THETA), sampled(GEN), sampled(REF), MASK)
    np.testing.assert_allclose(expected(value), per_token_kl(THETA, REF), rtol=1e-12)
    assert (value >= 0).all() and (value[~MASK] == 0).all()


def test_kl_to_reference_is_finite_where_policies_are_far_apart() -> None:
    gen, theta, ref = torch.tensor([[-1.0]]), torch.tensor([[-120.0]]), torch.tensor([[-1.0]])
    value = d.kl_to_reference(theta, gen, ref, torch.ones(1, 1, dtype=torch.bool))
    assert value.item() == pytest.approx(1)  # ρ·π_ref/π_θ = π_ref/π_gen; the rest vanishes


def test_prefix_weights_are_the_ratio_of_prefix_probabilities() -> None:
    weight = d.prefix_weights(sampled(THETA), sampled(GEN), MASK)
    for i, y in enumerate(RESPONSES):
        second = THETA.p(y[:1]) / GEN.p(y[:1]) if len(y) == 2 else 0
        np.testing.assert_allclose(weight[i], [1, second], rtol=1e-12)


@pytest.mark.parametrize("conditionals", ["exact", "sampled"])
def test_sequence_kl_to_generator_needs_prefix_weights(conditionals: str) -> None:
    if conditionals == "exact":
        kl_NL = d.exact_kl(full(THETA), full(GEN), MASK)
    else:
        kl_NL = d.kl_to_generator(sampled(THETA), sampled(GEN), MASK)
    weight_NL = d.prefix_weights(sampled(THETA), sampled(GEN), MASK)
    value = expected(d.sequence_kl_to(kl_NL, weight_NL))
    assert value == pytest.approx(sequence_kl(THETA, GEN), rel=1e-12)
    assert abs(expected(kl_NL.sum(-1)) - value) > 0.05


@pytest.mark.parametrize("conditionals", ["exact", "sampled"])
def test_sequence_kl_to_reference_on_the_generators_samples(conditionals: str) -> None:
    if conditionals == "exact":
        kl_NL = d.exact_kl(full(THETA), full(REF), MASK)
    else:
        kl_NL = d.kl_to_reference(sampled(THETA), sampled(GEN), sampled(REF), MASK)
    weight_NL = d.prefix_weights(sampled(THETA), sampled(GEN), MASK)
    value = expected(d.sequence_kl_to(kl_NL, weight_NL))
    assert value == pytest.approx(sequence_kl(THETA, REF), rel=1e-12)


@pytest.mark.parametrize("conditionals", ["exact", "sampled"])
def test_sequence_kl_from_generator_needs_no_weights(conditionals: str) -> None:
    if conditionals == "exact":
        kl_NL = d.exact_kl(full(GEN), full(THETA), MASK)
    else:
        kl_NL = d.kl_from_generator(sampled(THETA), sampled(GEN), MASK)
    value = expected(d.sequence_kl_from_generator(kl_NL))
    assert value == pytest.approx(sequence_kl(GEN, THETA), rel=1e-12)


def test_every_divergence_of_a_policy_from_itself_is_zero() -> None:
    g = sampled(GEN)
    for value in (
        d.exact_kl(full(GEN), full(GEN), MASK),
        d.kl_from_generator(g, g, MASK),
        d.kl_to_generator(g, g, MASK),
        d.kl_to_reference(g, g, g, MASK),
    ):
        assert (value == 0).all()


def test_ess_is_one_over_the_second_moment_of_the_weights() -> None:
    """A sample that holds each response exactly as often as π_gen says: 1/E_gen[ρ²]."""
    log_ratio_N = torch.tensor([np.log(THETA.p(y) / GEN.p(y)) for y in RESPONSES])
    times = (WEIGHT * 1000).round().long()
    np.testing.assert_allclose(times.double() / 1000, WEIGHT, rtol=1e-12)
    log_ratio = log_ratio_N.repeat_interleave(times)
    exact = 1 / sum(THETA.p(y) ** 2 / GEN.p(y) for y in RESPONSES)
    assert d.ess(log_ratio, torch.ones(1000, dtype=torch.bool)).item() == pytest.approx(exact)


def test_ess_by_hand() -> None:
    valid = torch.tensor([True, True, True, False])
    value = d.ess(torch.tensor([0.0, np.log(2.0), np.log(3.0), np.nan]), valid)
    assert value.item() == pytest.approx(36 / (3 * 14))  # (1 + 2 + 3)²/(3·(1 + 4 + 9))
    assert d.ess(torch.full((4,), 500.0), valid).item() == pytest.approx(1)
    assert d.ess(torch.tensor([0.0, -900.0, -900.0, 0.0]), valid).item() == pytest.approx(1 / 3)
    assert d.ess(torch.zeros(2), torch.zeros(2, dtype=torch.bool)).isnan()


def test_clipped_counts_ratios_outside_the_range_only_under_the_mask() -> None:
    log_ratio = torch.tensor([0.75, 0.85, 1.0, 1.15, 1.25, 1.25]).log()
    mask = torch.tensor([True] * 5 + [False])
    assert d.clipped(log_ratio, mask, 0.2).tolist() == [1, 0, 0, 0, 1, 0]
    assert d.clipped(torch.tensor([np.nan]), torch.tensor([False]), 0.2).tolist() == [0]
