"""The two conditions' measures, against enumeration and exact discrete policies."""

import itertools
import math

import numpy as np
import pytest

from cluster.advise.conditions import (
    BETAS,
    LIKELY,
    Estimate,
    bootstrap,
    expected_best,
    measure_coverage,
    measure_peak,
    nats_of_best,
    normal_best,
    share,
    sizes,
    spread,
    tilted,
)


def drawn(draw, prompts=10, each=200, seed=0):
    """Groups of `draw(generator, count)`."""
    random = np.random.default_rng(seed)
    return [np.asarray(draw(random, each), dtype=np.float64) for _ in range(prompts)]


def passing(rate):
    """Rewards of 1 at this rate, else 0."""
    return lambda random, count: random.random(count) < rate


# --- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_best_of_n_is_the_mean_over_all_subsets(n):
    reward_M = np.random.default_rng(1).normal(size=8).round(1)  # with ties
    subsets = [max(subset) for subset in itertools.combinations(reward_M, n)]
    assert expected_best(reward_M, n) == pytest.approx(np.mean(subsets))


def test_the_nats_of_best_of_n_are_its_divergence():
    for n in (1, 2, 16, 64):
        cdf = np.linspace(0, 1, 200_001) ** n  # of the best's rank among equally likely responses
        p = np.diff(cdf)
        p = p[p > 0]
        assert nats_of_best(n) == pytest.approx((p * np.log(p * 200_000)).sum(), abs=1e-3)


def test_the_best_of_n_normal_numbers_is_the_known_one():
    known = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 100: 2.50759}
    for n, value in known.items():
        assert normal_best(n) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("beta", [3.0, 1.0, 0.2])
def test_a_tilted_policy_is_the_exact_one_where_samples_have_the_exact_shares(beta):
    reward_V, p_V = np.array([0.0, 0.5, 2.0]), np.array([0.5, 0.4, 0.1])
    q_V = p_V * np.exp(reward_V / beta)
    q_V /= q_V.sum()
    reward, kl, ess = tilted(np.repeat(reward_V, (p_V * 1000).astype(int)), beta)
    assert reward == pytest.approx(q_V @ reward_V)
    assert kl == pytest.approx(q_V @ np.log(q_V / p_V))
    assert ess == pytest.approx(1000 / (q_V @ (q_V / p_V)))


def test_colder_tilts_gain_reward_at_more_nats_and_fewer_samples_up_to_one():
    (reward_M,) = drawn(lambda random, n: random.normal(size=n), prompts=1)
    rewards, nats, ess = zip(*[tilted(reward_M, beta) for beta in (*BETAS, 1e-9)])
    assert list(rewards) == sorted(rewards) and list(nats) == sorted(nats)
    assert list(ess) == sorted(ess, reverse=True)
    assert rewards[-1] == reward_M.max() and ess[-1] == pytest.approx(1.0)
    assert nats[-1] == pytest.approx(math.log(len(reward_M)))


def test_the_spread_leaves_out_what_prompts_differ_by():
    assert spread([np.array([0.0, 2.0]), np.array([100.0, 102.0])]) == 1.0


def test_bests_are_of_at_most_half_of_the_smallest_group():
    assert sizes([np.zeros(200), np.zeros(130)]) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes([np.zeros(2)]) == sizes([np.zeros(3)]) == [1]


# --- intervals -------------------------------------------------------------------------------


def test_bootstrap_intervals_hold_the_true_mean():
    held = 0
    for seed in range(40):
        groups = drawn(lambda random, n: random.exponential(size=n), 8, 50, seed)
        (mean,) = bootstrap(groups, lambda g: np.array([np.concatenate(g).mean()]), seed)
        held += mean.low <= 1.0 <= mean.high
    assert held >= 36


def test_a_share_of_none_is_under_the_rule_of_wilson():
    assert share([np.zeros(1000, dtype=bool)]) == pytest.approx((0, 0, 1.96**2 / (1000 + 1.96**2)))


def test_a_share_is_less_certain_where_prompts_differ():
    alike = share(drawn(passing(0.5)))
    apart = share([np.full(200, side) for side in (True, False)] * 5)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)


def test_a_threshold_within_the_interval_decides_nothing():
    estimate = Estimate(0.5, 0.4, 0.6)
    assert [estimate.side(x) for x in (0.3, 0.45, 0.6, 0.7)] == [1, 0, 0, -1]


# --- C1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, verdict", [(0.3, "near"), (0.02, "near"), (0.0005, "far"), (0.0, "far")]
)
def test_the_peak_is_near_where_the_upper_half_of_the_range_is_made(rate, verdict):
    peak = measure_peak(drawn(passing(rate)), 0.0, 1.0)
    assert (peak.verdict, peak.enough) == (verdict, None)


@pytest.mark.parametrize("rate, verdict", [(0.0, "far"), (0.03, "near")])
def test_few_samples_are_unclear_and_as_many_as_are_named_decide(rate, verdict):
    peak = measure_peak([np.zeros(20)], 0.0, 1.0)
    assert peak.verdict == "unclear" and 500 < peak.enough < 1000
    assert measure_peak(drawn(passing(rate), 1, peak.enough), 0.0, 1.0).verdict == verdict


def test_verdicts_of_a_share_on_the_threshold_are_wrong_in_one_case_of_twenty():
    sides = [share(drawn(passing(LIKELY), seed=seed)).side(LIKELY) for seed in range(200)]
    assert np.mean(np.array(sides) != 0) <= 0.08


def test_a_share_at_the_threshold_is_too_close_to_call():
    hits = np.zeros(2000)
    hits[: round(2000 * LIKELY)] = 1.0
    peak = measure_peak([hits], 0.0, 1.0)
    assert peak.verdict == "unclear" and peak.enough is None


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (50.0, -7.0)])
def test_the_verdict_does_not_depend_on_the_rewards_unit(scale, shift):
    for rate, verdict in ((0.02, "near"), (0.0005, "far")):
        groups = [scale * g + shift for g in drawn(passing(rate))]
        assert measure_peak(groups, shift, scale + shift).verdict == verdict
        assert measure_peak(groups, None, scale + shift).verdict == verdict


@pytest.mark.parametrize(
    "name, verdict", [("uniform", "near"), ("normal", "far"), ("exponential", "far")]
)
def test_without_a_greatest_reward_a_best_of_n_that_has_levelled_off_is_near(name, verdict):
    peak = measure_peak(drawn(lambda random, n: getattr(random, name)(size=n)), None, None)
    assert peak.verdict == verdict and peak.share is None
    assert peak.rise.low < peak.rise.value < peak.rise.high


def test_without_a_greatest_reward_few_samples_or_one_reward_tell_nothing():
    few = measure_peak(drawn(lambda random, n: random.normal(size=n), 2, 10), None, None)
    same = measure_peak([np.ones(100)], None, None)
    assert few.verdict == same.verdict == "unclear"
    assert (
        few.enough > 20 and same.enough is None and same.why == "every response has the same reward"
    )


# --- C2 --------------------------------------------------------------------------------------


def likelihoods(mean, rows=50, each=4, seed=0):
    return drawn(lambda random, n: random.normal(mean, 0.5, n), rows, each, seed)


def test_data_of_the_policy_itself_is_covering_and_one_in_a_hundred_of_it_outside():
    own, data = likelihoods(-3.0, 10, 200), likelihoods(-3.0, 500, seed=1)
    found = measure_coverage(own, data)
    assert found.verdict == "covers" and found.outside.low <= 0.01 <= found.outside.high
    assert found.difference.low <= 0.0 <= found.difference.high


def test_data_that_the_policy_hardly_makes_misses_it_by_its_difference():
    found = measure_coverage(likelihoods(-3.0, 10, 200), likelihoods(-6.0))
    assert found.verdict == "misses" and found.outside.value == 1.0
    assert found.difference.value == pytest.approx(-3.0, abs=0.1)


def test_little_data_on_the_threshold_is_unclear():
    own = likelihoods(-3.0, 10, 200)
    found = measure_coverage(own, likelihoods(-3.0, 3, 2) + likelihoods(-9.0, 4, 2))
    assert found.verdict == "unclear" and found.enough > 14
