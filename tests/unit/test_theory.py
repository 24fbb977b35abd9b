"""The study `theory` against brute force: gradients by differences, steps by plain loops."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from cluster.study import theory

ETAS = (1e-4, 1e-2, 1.0, 10.0)
CASES = pytest.mark.parametrize("case", theory.CASES, ids=lambda case: f"case_{case.number}")


def softmax(logits: list) -> list:
    """In plain Python, so that complex logits pass through."""
    powers = [np.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def forward(logits: list, q: list) -> complex:
    """KL(q‖softmax(θ)), term by term."""
    return sum(b * np.log(b / a) for a, b in zip(softmax(logits), q))


def reverse(logits: list, q: list) -> complex:
    """KL(softmax(θ)‖q), term by term."""
    return sum(a * np.log(a / b) for a, b in zip(softmax(logits), q))


KLS = {"forward": forward, "reverse": reverse}


def gradient(divergence: str, p: list, q: list) -> np.ndarray:
    """By a difference along the imaginary axis, f(θ + ih)/h: no cancellation, so exact."""
    slopes = []
    for j in range(len(p)):
        logits = [complex(math.log(value)) for value in p]
        logits[j] += 1e-30j
        slopes.append(KLS[divergence](logits, q).imag / 1e-30)
    return np.array(slopes)


def brute(divergence: str, p: list, q: list, eta: float) -> float:
    """ln(p'_1/p'_2) after one step, nothing used but the divergence's definition."""
    logits = np.log(p) - eta * gradient(divergence, p, q)
    after = softmax(list(logits))
    return math.log(after[0]) - math.log(after[1])


def drawn(equal: str, n: int = 60) -> list:
    """n cases as lists p, q of 3 to 8 categories, in which the pair fits the case."""
    rng, pairs = np.random.default_rng(7), []
    for k in rng.integers(3, 9, n):
        p_NK, q_NK = theory.draw(equal, 1, int(k), rng)
        pairs.append((p_NK[0].tolist(), q_NK[0].tolist()))
    return pairs


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_direction_is_minus_the_gradient_of_its_kl_in_the_logits(divergence: str) -> None:
    for p, q in drawn("p", 20) + drawn("q", 20):
        expected = gradient(divergence, p, q)
        value = theory.DIRECTIONS[divergence](np.array([p]), np.array([q]))[0]
        np.testing.assert_allclose(value, -expected, atol=1e-13)
        central = []
        for h_K in 1e-6 * np.eye(len(p)):  # the difference along the real axis says so too
            up, down = (KLS[divergence](list(np.log(p) + sign * h_K), q) for sign in (1, -1))
            central.append((up - down) / 2e-6)
        np.testing.assert_allclose(central, expected, atol=1e-7)


@pytest.mark.parametrize("eta", ETAS)
@CASES
def test_the_log_ratio_moves_by_eta_times_the_difference_of_directions(
    case: theory.Case, eta: float
) -> None:
    for p, q in drawn(case.equal, 20):
        formula = theory.shifts(case.equal, np.array([p]), np.array([q]))
        for divergence in KLS:
            moved = brute(divergence, p, q, eta) - math.log(p[0] / p[1])
            assert moved == pytest.approx(eta * formula[divergence][0], abs=1e-12)


def test_a_step_gives_the_distribution_that_brute_force_gives() -> None:
    for p, q in drawn("q", 20):
        for divergence in KLS:
            logp_NK = theory.step(np.array([p]), np.array([q]), np.array([3.0]), divergence)
            after = softmax(list(np.log(p) - 3 * gradient(divergence, p, q)))
            np.testing.assert_allclose(np.exp(logp_NK[0]), after, rtol=1e-12)


def test_which_divergence_moves_further_does_not_depend_on_the_learning_rate() -> None:
    for p, q in drawn("p", 30) + drawn("q", 30):
        gains = [brute("reverse", p, q, eta) - brute("forward", p, q, eta) for eta in ETAS]
        np.testing.assert_allclose(np.array(gains) / ETAS, gains[-1] / ETAS[-1], atol=1e-10)


def test_reverse_kl_moves_mass_further_exactly_where_p_exceeds_the_logarithmic_mean() -> None:
    sides = set()
    for p, q in drawn("p", 100):
        mean = (q[0] - q[1]) / math.log(q[0] / q[1])
        further = brute("reverse", p, q, 1.0) > brute("forward", p, q, 1.0)
        assert further == (p[0] > mean)
        sides.add(further)
    assert sides == {True, False}


def test_reverse_kl_moves_mass_further_exactly_where_q_e_to_the_d_exceeds_the_identric_mean() -> (
    None
):
    sides = set()
    for p, q in drawn("q", 100):
        a, b = p[:2]
        identric = (a**a / b**b) ** (1 / (a - b)) / math.e
        reach = q[0] * math.exp(sum(x * math.log(x / y) for x, y in zip(p, q)))
        further = brute("reverse", p, q, 1.0) > brute("forward", p, q, 1.0)
        assert further == (reach > identric)
        sides.add(further)
    assert sides == {True, False}


def test_the_means_are_the_integrals_that_define_them() -> None:
    """∫ a^t·b^(1−t) dt and exp ∫ ln(t·a + (1−t)·b) dt over 0 … 1, by Gauss and Legendre."""
    node, weight = np.polynomial.legendre.leggauss(60)
    node, weight = (node + 1) / 2, weight / 2
    for a, b in ((0.5, 0.1), (0.31, 0.3), (0.3 * (1 + 1e-12), 0.3), (1e-3, 1e-4)):
        logarithmic = weight @ (a**node * b ** (1 - node))
        identric = weight @ np.log(node * a + (1 - node) * b)
        pair = np.array([a]), np.array([b])
        assert theory.logarithmic_mean(*pair)[0] == pytest.approx(logarithmic, rel=1e-10)
        assert theory.log_identric_mean(*pair)[0] == pytest.approx(identric, rel=1e-10)


@pytest.mark.parametrize("k", [3, 100])
@pytest.mark.parametrize("equal", ["p", "q"])
def test_draws_are_distributions_whose_pair_fits_the_case(equal: str, k: int) -> None:
    p_NK, q_NK = theory.draw(equal, 500, k, np.random.default_rng(1))
    same_NK, other_NK = (p_NK, q_NK) if equal == "p" else (q_NK, p_NK)
    assert (p_NK > 0).all() and (q_NK > 0).all()
    np.testing.assert_allclose([p_NK.sum(-1), q_NK.sum(-1)], 1, rtol=1e-12)
    assert (same_NK[:, 0] == same_NK[:, 1]).all() and (other_NK[:, 0] > other_NK[:, 1]).all()


def one(case: theory.Case, p: list, q: list) -> dict:
    """The outcomes of a single case."""
    found = theory.outcomes(case, np.array([p]), np.array([q]), np.array([1.0]))
    return {name: value[0] for name, value in found.items()}


def test_the_words_of_cases_1_and_3_alone_have_counterexamples() -> None:
    little_p = one(theory.CASES[0], [0.01, 0.01, 0.98], [0.5, 0.3, 0.2])  # far below ~0.39
    assert little_p["premise_held"] and little_p["informal_failures"]
    far_away = one(theory.CASES[2], [0.03, 0.02, 0.9, 0.05], [0.015, 0.015, 0.001, 0.969])  # D ≈ 6
    assert far_away["premise_held"] and far_away["informal_failures"]
    for found in (little_p, far_away):
        assert not found["condition_held"] and not found["violations"]


def test_the_words_of_case_2_always_imply_its_exact_condition() -> None:
    """Since q > p₁ > I and D ≥ 0."""
    case, premises = theory.CASES[1], 0
    for p, q in drawn(case.equal, 300):
        found = one(case, p, q)
        premises += found["premise_held"]
        assert found["condition_held"] or not found["premise_held"]
    assert premises > 30


def test_equal_outcomes_are_ties_and_nothing_else() -> None:
    p = [1 / 3, 1 / 3, 1 / 3]
    tied = one(theory.CASES[0], p, [1 / 3 + 1e-7, 1 / 3, 1 / 3 - 1e-7])
    assert tied["ties"] and not (tied["violations"] or tied["premise_held"])


@CASES
def test_random_draws_never_violate_the_exact_condition(case: theory.Case) -> None:
    row = theory.tally(case, 6000, np.random.default_rng(3))
    assert row["draws"] == 6000 and row["violations"] == 0 and row["ties"] < 6
    assert row["max_error"] < theory.EXACT
    assert 1000 < row["condition_held"] < 5000


@pytest.mark.parametrize(("number", "equal"), [(1, "p"), (2, "q"), (3, "q")])
def test_a_condition_that_is_nearly_right_is_found_out(
    monkeypatch: pytest.MonkeyPatch, number: int, equal: str
) -> None:
    """The arithmetic mean in the place of the logarithmic or identric one."""
    nearly = {
        "p": lambda p, q: p[:, 0] - q[:, :2].mean(-1),
        "q": lambda p, q: np.log(q[:, 0]) + theory.kl(p, q) - np.log(p[:, :2].mean(-1)),
    }
    monkeypatch.setitem(theory.MARGINS, equal, nearly[equal])
    row = theory.tally(theory.CASES[number - 1], 3000, np.random.default_rng(3))
    assert row["violations"] > 10


def test_wilsons_interval_is_where_the_score_test_turns() -> None:
    low, high = theory.wilson(30, 200)
    for bound in (low, high):  # (p̂ − p)² = z²·p·(1 − p)/n
        assert (0.15 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 200)
    assert low < 0.15 < high
    none, every = theory.wilson(0, 50), theory.wilson(50, 50)
    assert none[0] == 0 and every == pytest.approx([1 - none[1], 1])
    assert theory.wilson(0, 0) == [0, 1]


def test_the_figures_title_is_true_of_what_it_draws() -> None:
    start_K, target_K = theory.example()
    path = {
        d: theory.descend(start_K, target_K, d, theory.STEPS, theory.STEP_ETA)
        for d in theory.DIRECTIONS
    }
    for path_TK in path.values():
        np.testing.assert_allclose(path_TK.sum(-1), 1, rtol=1e-12)
        distance_T = theory.kl(path_TK, target_K)
        assert distance_T[-1] < 0.05 * distance_T[0]
    begun = slice(1, 100)
    assert (path["reverse"][begun, 6] < path["forward"][begun, 6]).all()
    fullest = {d: path[d][:, 11].max() / target_K[11] for d in path}
    assert fullest["reverse"] > 3 and fullest["forward"] < 1.01
    reached = {d: int(np.argmax(path[d][:, 13] > 0.9 * target_K[13])) for d in path}
    assert 0 < reached["forward"] < reached["reverse"]


def test_a_study_writes_its_files_and_is_the_same_each_time(tmp_path: Path) -> None:
    claims = theory.run(tmp_path / "a", draws=1500, seed=2)
    assert theory.run(tmp_path / "b", draws=1500, seed=2) == claims
    assert theory.run(tmp_path / "c", draws=1500, seed=3) != claims
    assert json.loads((tmp_path / "a" / "claims.json").read_text()) == claims
    keys = {"name", "section", "says", "verdict", "effect", "interval", "n", "evidence"}
    assert all(set(claim) == keys for claim in claims)
    assert all(claim["interval"][0] <= claim["effect"] <= claim["interval"][1] for claim in claims)
    assert len({claim["name"] for claim in claims}) == len(claims) == 7
    rows = pyarrow.parquet.read_table(tmp_path / "a" / "results.parquet").to_pylist()
    assert [(row["case"], row["draws"], row["violations"]) for row in rows] == [
        (number, 500, 0) for number in (1, 2, 3)
    ]
    mass = pyarrow.parquet.read_table(tmp_path / "a" / "mass.parquet")
    assert mass.num_rows == 2 * (theory.STEPS + 1) * 21
    assert (tmp_path / "a" / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_verdicts_follow_the_counts() -> None:
    row = {"case": 1, "draws": 100, "max_error": 1.0, "condition_held": 50, "ties": 0}
    row |= {"violations": 1, "premise_held": 0, "informal_failures": 0}
    row |= {"far_held": 0, "far_failures": 0}
    verdicts = {claim["name"]: claim["verdict"] for claim in theory.claims([row])}
    assert verdicts == {
        "theory_case_1_exact": "does not hold",
        "theory_case_1_informal": "undecided",
        "theory_one_step": "does not hold",
    }
