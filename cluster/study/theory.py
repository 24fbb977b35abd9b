"""Which of forward and reverse KL moves more mass in one step: the paper's Theorem 5.2, tried.

A categorical distribution p = softmax(θ) over K categories descends on θ towards a target q, by one
step of learning rate η, on one of two divergences. With D = KL(p‖q), minus the gradients are

    forward KL(q‖p):  dθ_j = q_j − p_j            reverse KL(p‖q):  dθ_j = −p_j·(ln(p_j/q_j) − D)

The normaliser cancels from a ratio: ln(p'_1/p'_2) = ln(p_1/p_2) + η·(dθ_1 − dθ_2), exactly. So
which divergence leaves the greater ratio does not depend on η, and the exact conditions are:

- p_1 = p_2 = p, q_1 > q_2: forward adds η·(q_1 − q_2), reverse η·p·ln(q_1/q_2). Reverse leaves the
  greater ratio iff p exceeds the logarithmic mean of q_1 and q_2;
- q_1 = q_2 = q, p_1 > p_2: forward adds −η·(p_1 − p_2), reverse η·(p_1 − p_2)·(ln q + D − ln I − 1)
  where I is the identric mean of p_1 and p_2. Reverse leaves the greater ratio iff q·e^D > I.

Section 5.2 of arXiv 2404.14367 has them in words, as three cases. `CASES` gives each case's exact
condition and its *informal premise*, our own reading of those words; "far" is the same premise by
a factor of ten, to see how much hangs on the reading. The premise alone is not enough in
cases 1 and 3, even far; in case 2 it is, since q > p_1 > I and D ≥ 0.

The study draws random cases, makes the step on the whole distribution in float64, and counts where
its outcome differs from the exact condition (a violation) or from the informal statement (a
failure). Failure rates belong to the law of the draws; that there are any does not.
Arrays: N draws, K categories; the pair compared is in columns 0 and 1. Probabilities are positive.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from cluster.study import theory_plot

Array = NDArray[np.float64]
DRAWS, QUICK = 120_000, 12_000  # draws of the study, and of a quick one
CATEGORIES = (3, 100)  # K, uniform, both ends included
CONCENTRATION = (0.3, 30.0)  # Dirichlet parameter, log-uniform, drawn for p and q apart
ETA = (1e-4, 1e1)  # learning rate, log-uniform
TIE = 1e-12  # nats: ratios whose logarithms differ by less are tied, within float64's reach
EXACT = 1e-11  # nats: most by which the one-step formulas may differ from the step itself
FAR = 10.0  # factor by which a premise holds that holds "far"
STEPS, STEP_ETA = 500, 1.0  # of the figure's descent


def kl(p_NK: Array, q_NK: Array) -> Array:
    """KL(p‖q) in nats, [N]."""
    return np.sum(p_NK * np.log(p_NK / q_NK), -1)


def forward_direction(p_NK: Array, q_NK: Array) -> Array:
    """Minus the gradient of KL(q‖p) in p's logits, [N, K]."""
    return q_NK - p_NK


def reverse_direction(p_NK: Array, q_NK: Array) -> Array:
    """Minus the gradient of KL(p‖q) in p's logits, [N, K]."""
    return -p_NK * (np.log(p_NK / q_NK) - kl(p_NK, q_NK)[..., None])


DIRECTIONS = {"forward": forward_direction, "reverse": reverse_direction}


def step(p_NK: Array, q_NK: Array, eta_N: Array, divergence: str) -> Array:
    """ln p' = ln softmax(θ + η·dθ) after one step of "forward" or "reverse" KL, [N, K]."""
    direction_NK = DIRECTIONS[divergence](p_NK, q_NK)
    logits_NK = np.log(p_NK) + eta_N[..., None] * direction_NK
    logits_NK -= logits_NK.max(-1, keepdims=True)
    return logits_NK - np.log(np.exp(logits_NK).sum(-1, keepdims=True))


def logarithmic_mean(a_N: Array, b_N: Array) -> Array:
    """(a − b)/ln(a/b) for a > b > 0, [N]. Between the geometric and the arithmetic mean."""
    return (a_N - b_N) / np.log1p((a_N - b_N) / b_N)


def log_identric_mean(a_N: Array, b_N: Array) -> Array:
    """ln I = (a·ln a − b·ln b)/(a − b) − 1 for a > b > 0, [N]; written so as not to cancel."""
    excess_N = (a_N - b_N) / b_N
    return np.log(b_N) + (1 + excess_N) * np.log1p(excess_N) / excess_N - 1


def margin_equal_p(p_NK: Array, q_NK: Array) -> Array:
    """p − logarithmic mean of q_1 and q_2, [N]: > 0 iff reverse leaves the greater ratio."""
    return p_NK[:, 0] - logarithmic_mean(q_NK[:, 0], q_NK[:, 1])


def margin_equal_q(p_NK: Array, q_NK: Array) -> Array:
    """ln(q·e^D) − ln I, [N]: > 0 iff reverse leaves the greater ratio."""
    log_reach_N = np.log(q_NK[:, 0]) + kl(p_NK, q_NK)
    return log_reach_N - log_identric_mean(p_NK[:, 0], p_NK[:, 1])


def shifts(equal: str, p_NK: Array, q_NK: Array) -> dict[str, Array]:
    """The one-step formulas (the paper's Lemma E.4 for a pair): change of ln(p_1/p_2) over η."""
    (p1_N, p2_N), (q1_N, q2_N) = p_NK[:, :2].T, q_NK[:, :2].T
    if equal == "p":
        return {"forward": q1_N - q2_N, "reverse": p1_N * np.log(q1_N / q2_N)}
    gap_N = p1_N - p2_N
    return {"forward": -gap_N, "reverse": gap_N * (margin_equal_q(p_NK, q_NK) - 1)}


@dataclass(frozen=True)
class Case:
    """One of Theorem 5.2's cases. equal: which of p and q gives both categories the same."""

    number: int
    equal: str
    greater: bool  # says that reverse leaves the greater ratio; else the smaller
    premise: Callable[[Array, Array, float], Any]  # our reading, by a factor: p, q, f -> bool [N]
    words: str  # the premise
    condition: str  # the exact one


CASES = (
    Case(1, "p", True, lambda p, q, f: q[:, 0] > f * q[:, 1], "p₁ = p₂ and q₁ > q₂",
         "p exceeds the logarithmic mean of q₁ and q₂"),
    Case(2, "q", True, lambda p, q, f: q[:, 0] > f * p[:, 0], "p₁ > p₂ and q₁ = q₂ > p₁",
         "q·e^D exceeds the identric mean of p₁ and p₂"),
    Case(3, "q", False, lambda p, q, f: f * q[:, 0] < p[:, 1], "p₁ > p₂ and q₁ = q₂ < p₂",
         "q·e^D is below the identric mean of p₁ and p₂"),
)  # fmt: skip
MARGINS = {"p": margin_equal_p, "q": margin_equal_q}


def log_uniform(bounds: tuple[float, float], n: int, rng: np.random.Generator) -> Array:
    """n numbers whose logarithm is uniform between the bounds', [N]."""
    return np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]), n))


def dirichlet(n: int, k: int, rng: np.random.Generator) -> Array:
    """n distributions over k categories, symmetric Dirichlet of random concentration, [N, K]."""
    concentration_N = log_uniform(CONCENTRATION, n, rng)
    gamma_NK = np.maximum(rng.standard_gamma(concentration_N[:, None], (n, k)), 1e-30)
    return gamma_NK / gamma_NK.sum(-1, keepdims=True)


def draw(equal: str, n: int, k: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """p and q, [N, K]: the one named `equal` gives the pair its mean, the other orders it."""
    p_NK, q_NK = dirichlet(n, k, rng), dirichlet(n, k, rng)
    same_NK, other_NK = (p_NK, q_NK) if equal == "p" else (q_NK, p_NK)
    same_NK[:, :2] = same_NK[:, :2].mean(-1, keepdims=True)
    other_NK[:, :2] = np.sort(other_NK[:, :2], -1)[:, ::-1]
    return p_NK, q_NK


def outcomes(case: Case, p_NK: Array, q_NK: Array, eta_N: Array) -> dict[str, Any]:
    """What one step of each divergence does to the pair, against what is said of it, each [N]."""
    log_p_NK = np.log(p_NK)
    formula, moved, error_N = shifts(case.equal, p_NK, q_NK), {}, np.zeros(len(p_NK))
    for divergence in DIRECTIONS:
        change_NK = step(p_NK, q_NK, eta_N, divergence) - log_p_NK
        moved[divergence] = change_NK[:, 0] - change_NK[:, 1]
        error_N = np.maximum(error_N, abs(moved[divergence] - eta_N * formula[divergence]))
    sign = 1 if case.greater else -1
    gain_N = sign * (moved["reverse"] - moved["forward"])  # > 0: as the case says
    condition_N = sign * MARGINS[case.equal](p_NK, q_NK) > 0
    tied_N = abs(gain_N) <= TIE
    premise_N, far_N = (case.premise(p_NK, q_NK, f) & ~tied_N for f in (1.0, FAR))
    return {
        "condition_held": condition_N,
        "ties": tied_N,
        "violations": ~tied_N & (condition_N != (gain_N > 0)),
        "premise_held": premise_N,
        "informal_failures": premise_N & (gain_N < 0),
        "far_held": far_N,
        "far_failures": far_N & (gain_N < 0),
        "max_error": error_N,
    }


def tally(case: Case, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    """One case's row of results: its counts over `draws` random draws, and the largest error."""
    row: dict[str, Any] = {"case": case.number, "draws": draws, "max_error": 0.0}
    first, last = CATEGORIES
    for k, n in enumerate(np.bincount(rng.integers(first, last + 1, draws))):
        if n == 0:
            continue
        p_NK, q_NK = draw(case.equal, int(n), k, rng)
        found = outcomes(case, p_NK, q_NK, log_uniform(ETA, int(n), rng))
        row["max_error"] = max(row["max_error"], float(found.pop("max_error").max()))
        for name, held_N in found.items():
            row[name] = row.get(name, 0) + int(held_N.sum())
    return row


def wilson(count: int, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's interval of a proportion, count of n, at 95 %; [0, 1] where n = 0."""
    if n == 0:
        return [0.0, 1.0]
    centre, spread = count + z * z / 2, z * math.sqrt(count * (n - count) / n + z * z / 4)
    low, high = (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)
    return [0.0 if count == 0 else low, 1.0 if count == n else high]


def example() -> tuple[Array, Array]:
    """The figure's start and target over 21 categories: peaks at 6 and, narrower, at 13, [K]."""
    x_K = np.arange(21)
    start_K = np.exp(-((x_K - 6) ** 2) / (2 * 3.0**2))
    target_K = np.exp(-((x_K - 13) ** 2) / (2 * 2.0**2)) + 1e-3
    return start_K / start_K.sum(), target_K / target_K.sum()


def descend(start_K: Array, target_K: Array, divergence: str, steps: int, eta: float) -> Array:
    """p before each of `steps` steps of one divergence and after the last, [steps + 1, K]."""
    path = [start_K]
    for _ in range(steps):
        log_p_NK = step(path[-1][None], target_K[None], np.array([eta]), divergence)
        path.append(np.exp(log_p_NK[0]))
    return np.array(path)


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the counts say of each exact condition, each informal statement, and the formulas."""
    found = [claim(row, case) for row, case in zip(rows, CASES) for claim in (_exact, _informal)]
    error, n = max(row["max_error"] for row in rows), sum(row["draws"] for row in rows)
    return [*found, {
        "name": "theory_one_step",
        "section": "Lemma E.4",
        "says": "One step changes the log-ratio of two categories by η(dθ₁ − dθ₂), in closed form.",
        "verdict": "holds" if error <= EXACT else "does not hold",
        "effect": error,
        "interval": [0.0, error],
        "n": n,
        "evidence": f"largest absolute error {error:.1e} nats of the formulas against the step"
                    f" itself, both divergences; at most {EXACT:.0e} counts as equal",
    }]  # fmt: skip


def _exact(row: dict[str, Any], case: Case) -> dict[str, Any]:
    count, n, side = row["violations"], row["draws"] - row["ties"], _side(case)
    return {
        "name": f"theory_case_{case.number}_exact",
        "section": "5.2",
        "says": f"Reverse KL leaves the {side} ratio exactly where {case.condition}.",
        "verdict": _verdict(count, n),
        "effect": count / max(n, 1),
        "interval": wilson(count, n),
        "n": n,
        "evidence": f"{count} violations in {n} draws; the condition held in"
                    f" {row['condition_held']}; {row['ties']} more tied within {TIE:.0e} nats",
    }  # fmt: skip


def _informal(row: dict[str, Any], case: Case) -> dict[str, Any]:
    count, n, side = row["informal_failures"], row["premise_held"], _side(case)
    return {
        "name": f"theory_case_{case.number}_informal",
        "section": "5.2",
        "says": f"It is enough for reverse KL to leave the {side} ratio that {case.words}.",
        "verdict": _verdict(count, n),
        "effect": count / max(n, 1),
        "interval": wilson(count, n),
        "n": n,
        "evidence": f"fails in {count} of {n} draws in which this premise, our reading, held;"
        f" {row['far_failures']} of {row['far_held']} where it held {FAR:.0f}-fold;"
        " the rate is that of these draws' law",
    }


def _side(case: Case) -> str:
    return "greater" if case.greater else "smaller"


def _verdict(exceptions: int, n: int) -> str:
    return "does not hold" if exceptions else "holds" if n else "undecided"


def run(folder: Path, draws: int = DRAWS, seed: int = 0) -> list[dict[str, Any]]:
    """Write results.parquet, mass.parquet, figure.png and claims.json to `folder`; the claims.

    draws: of all three cases together. mass.parquet has a row per divergence, step and category.
    """
    folder.mkdir(parents=True, exist_ok=True)
    streams = np.random.default_rng(seed).spawn(len(CASES))
    rows = [tally(case, draws // len(CASES), rng) for case, rng in zip(CASES, streams)]
    start_K, target_K = example()
    paths = {d: descend(start_K, target_K, d, STEPS, STEP_ETA) for d in DIRECTIONS}
    mass = [
        {"divergence": divergence, "step": i, "category": j, "mass": mass, "target": target_K[j]}
        for divergence, path_TK in paths.items()
        for (i, j), mass in np.ndenumerate(path_TK)
    ]
    for name, table in (("results", rows), ("mass", mass)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{name}.parquet")
    found = claims(rows)
    theory_plot.draw(folder / "figure.png", paths, target_K, found)
    (folder / "claims.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found
