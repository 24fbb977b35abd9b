"""The paper's two conditions, measured on samples of π_ref (arXiv 2404.14367, Figure 1).

C1: how far the reward's peak lies from π_ref. C2: how well preference data covers π_ref. Pure
functions. `groups` is a list with an array [M] for each prompt, of M samples' rewards or of their
log-likelihoods in nats per token. A best of n, or a tilted policy, is one prompt's; prompts count
alike. Intervals are of 95%.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Groups = list[np.ndarray]
Z = 1.96  # standard errors to an end of an interval
DRAWS = 200  # of the bootstrap
BETAS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)  # of the tilted policies, in s.d. of the reward
FEWEST = 10  # samples for a prompt, by ESS, that a tilted policy's figures must rest on
MOST_SAMPLES = 1_000_000

# C1, where the greatest reward is known. The peak lies where π_ref makes responses if at least one
# in 200 of them is past the middle of the reward's range: a thousand responses, such as an offline
# data set of 100 prompts with 10 each, then hold five of them for a likelihood to be raised on.
# With less there is hardly one, and methods that only raise what was sampled have nothing to raise.
LIKELY = 0.005
# C1, where it is not known: the peak lies within if the best of n has stopped rising. A reward
# that is normal under π_ref, for which more is always to be had at √(2·KL) s.d., sets the measure:
# under half of its rise from n/4 to n is levelling off (a uniform reward has a quarter of it).
LEVEL = 0.5
FEWEST_N = 8  # the largest n from which that is judged, at least
# C2: data covers π_ref if at most half of its responses are less likely than π_ref's lowest 1%.
TAIL, OUTSIDE = 0.01, 0.5


class Estimate(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float

    def side(self, threshold: float) -> int:
        """+1 where it is above the threshold for certain, −1 where below, 0 where not certain."""
        return int(self.low > threshold) - int(self.high < threshold)


class Tilt(NamedTuple):
    """π_ref·exp(r/β)/Z: β in s.d. of the reward, reward, KL to π_ref in nats per response, and
    the effective sample size for a prompt, of `samples`."""

    beta: float
    reward: Estimate
    kl: Estimate
    ess: float
    samples: float


@dataclass
class Peak:
    """C1. verdict: near, far or unclear; enough: samples that would likely do where unclear."""

    reward: Estimate
    spread: float  # s.d. within prompts
    range: tuple[float, float | None]  # least and greatest reward possible, as far as known
    share: Estimate | None  # of π_ref's responses past the middle of the range
    rise: Estimate | None  # of the best of n from n/4 to n, over a normal reward's
    best: dict[int, Estimate]  # n → expected best of n
    tilts: list[Tilt]
    verdict: str = "unclear"
    why: str = ""
    enough: int | None = field(default=None)


@dataclass
class Coverage:
    """C2. verdict: covers, misses or unclear; difference: data's mean log-likelihood under π_ref
    less that of π_ref's own samples, nats per token; outside: the share of the data's responses
    under `quantile`, the 1% quantile of π_ref's own."""

    responses: int
    difference: Estimate
    quantile: float
    outside: Estimate
    verdict: str
    why: str
    enough: int | None = None  # responses of data


def nats_of_best(n: int) -> float:
    """KL(best of n ‖ π_ref), nats per response, where no two rewards are equal; else its bound."""
    return math.log(n) - (n - 1) / n


def expected_best(reward_M: np.ndarray, n: int) -> float:
    """E[max of n] without bias: the mean over all subsets of n of the M ≥ n samples."""
    return float(np.sort(reward_M)[n - 1 :] @ _best_weights(len(reward_M), n))


@functools.cache
def _best_weights(samples: int, n: int) -> np.ndarray:
    """Chances that sample n, n + 1, … M in order is the best of a subset, C(i−1, n−1)/C(M, n)."""
    log = [math.lgamma(k + 1) for k in range(samples + 1)]
    whole = log[samples] - log[n] - log[samples - n]
    rank = range(n - 1, samples)
    return np.exp([log[i] - log[n - 1] - log[i - n + 1] - whole for i in rank])


def normal_best(n: int) -> float:
    """E[max of n] of a standard normal number."""
    x = np.linspace(-9.0, 9.0, 3601)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float((x * n * density * below ** (n - 1)).sum() * (x[1] - x[0]))


def tilted(reward_M: np.ndarray, beta: float) -> tuple[float, float, float]:
    """Reward, KL(tilted‖π_ref) in nats and effective sample size of π_ref·exp(r/β)/Z, from samples
    of π_ref, by self-normalised weights; the KL is at most ln M."""
    weight_M = np.exp((reward_M - reward_M.max()) / beta)
    weight_M /= weight_M.sum()
    positive = weight_M[weight_M > 0]
    kl = float(positive @ np.log(positive * len(weight_M)))
    return float(weight_M @ reward_M), max(0.0, kl), float(1 / (weight_M**2).sum())


def spread(groups: Groups) -> float:
    """s.d. within prompts."""
    return math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / sum(map(len, groups)))


def bootstrap(
    groups: Groups, statistic: Callable[[Groups], np.ndarray], seed: int
) -> list[Estimate]:
    """Each figure of a statistic, with the interval from resampling prompts, then their samples.

    Wider than need be where prompts do not differ.
    """
    random = np.random.default_rng(seed)
    drawn = np.array([statistic(_resampled(groups, random)) for _ in range(DRAWS)])
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Estimate(*map(float, figures)) for figures in zip(statistic(groups), *ends)]


def _resampled(groups: Groups, random: np.random.Generator) -> Groups:
    chosen = [groups[i] for i in random.integers(len(groups), size=len(groups))]
    return [group[random.integers(len(group), size=len(group))] for group in chosen]


def share(hits: Groups) -> Estimate:
    """The share of true samples, with Wilson's interval (1927) at the sample size that is left of
    them (Kish's design effect) where prompts differ by more than chance does in 19 of 20 cases."""
    mean_P = np.array([hit.mean() for hit in hits])
    count, p = sum(map(len, hits)), float(np.concatenate(hits).mean())
    effect = 1.0
    if len(hits) > 1 and 0 < p < 1:
        found = float(mean_P.var(ddof=1)) * count / len(hits) / (p * (1 - p))
        effect = found if found > 1 + 1.645 * math.sqrt(2 / (len(hits) - 1)) else 1.0
    return Estimate(p, *_wilson(p, count / effect))


def _wilson(p: float, count: float) -> tuple[float, float]:
    centre, scale = p + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * math.sqrt(p * (1 - p) / count + (Z / (2 * count)) ** 2)
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _enough(p: float, threshold: float, count: int) -> int | None:
    """Samples at which a share p would be off the threshold; None where over a million."""
    need = float(count)
    while need <= MOST_SAMPLES:
        if not Estimate(p, *_wilson(p, need)).side(threshold):
            need *= 1.2
        else:
            return _round_up(need)
    return None


def _round_up(count: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return unit * math.ceil(count / unit)


def sizes(groups: Groups) -> list[int]:
    """1, 2, 4, … up to half of the samples that each prompt has."""
    most = min(map(len, groups)) // 2
    return [2**k for k in range(most.bit_length())] or [1]


def measure_peak(groups: Groups, lower: float | None, upper: float | None, seed: int = 0) -> Peak:
    """C1 from the rewards of π_ref's samples. lower, upper: the least and greatest reward possible,
    None where not known; for the least stands the least seen."""
    ns, deviation = sizes(groups), spread(groups)
    betas = [beta * deviation for beta in BETAS] if deviation else []

    def figures(sample: Groups) -> np.ndarray:
        curve = [np.mean([expected_best(g, n) for g in sample]) for n in ns]
        tilts = [np.mean([tilted(g, beta) for g in sample], axis=0) for beta in betas]
        return np.array([*curve, *(tilt[k] for tilt in tilts for k in range(2))])

    found = bootstrap(groups, figures, seed)
    best, rest = dict(zip(ns, found)), found[len(ns) :]
    each = sum(map(len, groups)) / len(groups)
    tilts = [
        Tilt(BETAS[k], rest[2 * k], rest[2 * k + 1], _ess(groups, beta), each)
        for k, beta in enumerate(betas)
    ]
    low = float(min(g.min() for g in groups)) if lower is None else lower
    peak = Peak(best[1], deviation, (low, upper), None, None, best, tilts)
    if upper is None:
        _judge_by_rise(peak, groups, ns, seed)
    else:
        _judge_by_share(peak, groups, (low + upper) / 2)
    return peak


def _ess(groups: Groups, beta: float) -> float:
    return float(np.mean([tilted(g, beta)[2] for g in groups]))


def _judge_by_share(peak: Peak, groups: Groups, middle: float) -> None:
    """Near where responses past the middle of the range are at least LIKELY under π_ref."""
    hits, count = [g >= middle for g in groups], sum(map(len, groups))
    peak.share = share(hits)
    side = peak.share.side(LIKELY)
    peak.verdict = {1: "near", -1: "far", 0: "unclear"}[side]
    told = f"{sum(int(h.sum()) for h in hits):,} of {count:,} responses"
    peak.why = f"{told} pass {middle:.3g}, the middle of the reward's range"
    if not side:
        peak.enough = _enough(peak.share.value, LIKELY, count)


def _judge_by_rise(peak: Peak, groups: Groups, ns: Sequence[int], seed: int) -> None:
    """Near where the best of n has levelled off at the largest n."""
    n = ns[-1]
    if not peak.spread:
        peak.why = "every response has the same reward"
        return
    if n < FEWEST_N:
        peak.why = f"a best of {n} is the most that so few responses to a prompt show"
        peak.enough = 8 * FEWEST_N * len(groups)
        return
    normal = normal_best(n) - normal_best(n // 4)

    def rise(sample: Groups) -> np.ndarray:
        gain = np.mean([expected_best(g, n) - expected_best(g, n // 4) for g in sample])
        return np.array([gain / (max(spread(sample), 1e-12) * normal)])

    (peak.rise,) = bootstrap(groups, rise, seed)
    side = peak.rise.side(LEVEL)
    peak.verdict = {1: "far", -1: "near", 0: "unclear"}[side]
    what = "still rises" if side > 0 else "rises"
    peak.why = (
        f"from best of {n // 4} to best of {n} the reward {what} at {peak.rise.value:.2f} times "
        "a normal reward's rate, its greatest value not being known"
    )
    if not side:
        ratio = (peak.rise.high - peak.rise.low) / 2 / max(1e-9, abs(peak.rise.value - LEVEL))
        need = sum(map(len, groups)) * max(1.5, ratio**2)
        peak.enough = _round_up(need) if need <= MOST_SAMPLES else None


def measure_coverage(own: Groups, data: Groups, seed: int = 0) -> Coverage:
    """C2 from log-likelihoods under π_ref, nats per token: of π_ref's own responses, and of the
    data's, a group for each row."""
    random = np.random.default_rng(seed)
    drawn = [_compared(_resampled(own, random), _resampled(data, random)) for _ in range(DRAWS)]
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    difference, under, quantile = _compared(own, data)
    exact = share([row < quantile for row in data])
    outside = Estimate(under, min(exact.low, float(low[1])), max(exact.high, float(high[1])))
    side, count = outside.side(OUTSIDE), sum(map(len, data))
    why = (
        f"{under:.0%} of the data's responses are less likely under π_ref than the lowest 1% of "
        f"its own, at {difference:+.2f} nats per token on average"
    )
    return Coverage(
        count, Estimate(difference, float(low[0]), float(high[0])), quantile, outside,
        {1: "misses", -1: "covers", 0: "unclear"}[side], why,
        None if side else _enough(under, OUTSIDE, count + 1),
    )  # fmt: skip


def _compared(own: Groups, data: Groups) -> tuple[float, float, float]:
    """Difference of means, share of data under the quantile, the quantile."""
    mine, theirs = np.concatenate(own), np.concatenate(data)
    quantile = float(np.quantile(mine, TAIL))
    return float(theirs.mean() - mine.mean()), float((theirs < quantile).mean()), quantile
