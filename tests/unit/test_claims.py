"""Claims: what holds, what does not and what is undecided follows from the trials alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cluster.study import page
from cluster.study.claims import decide
from cluster.study.spec import Claim, Study
from cluster.study.take import scalars
from cluster.study.welch import interval, t_quantile
from tests.unit import study_frames
from tests.unit.test_report import Page

AXES = {"reward": ["R1", "R2"], "B": ["100", "300", "1000"]}
SPREAD = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])


def claim(test: str = "greater", **fields: Any) -> Claim:
    arms = {"more": {"B": "100"}, "less": {"B": "1000"}} if test in ("greater", "similar") else {}
    return Claim("fresher is better", "4.1", "Fresher\n samples do better.", test,
                 **{**arms, **fields})  # fmt: skip


def trials(means: dict[str, float], spread: np.ndarray = SPREAD, reward: str = "R1") -> dict:
    return {(reward, label): mean + spread for label, mean in means.items()}


def verdict(means: dict[str, float], spread: np.ndarray = SPREAD, **fields: Any) -> dict[str, Any]:
    return decided(claim(**fields), study_frames.table(trials(means, spread), ["reward", "B"]))


def decided(one: Claim, frame: pd.DataFrame, **fields: Any) -> dict[str, Any]:
    (result,) = decide(study_frames.study(AXES, claims=(one,), **fields), frame)
    return result


def test_a_difference_beyond_the_noise_holds_and_reversed_it_does_not() -> None:
    good = verdict({"100": 0.9, "1000": 0.5})
    assert good["verdict"] == "holds"
    assert good["effect"] == pytest.approx(0.4) and good["n"] == {"B 100": 5, "B 1000": 5}
    low, high = good["interval"]
    assert 0 < low < 0.4 < high
    assert verdict({"100": 0.5, "1000": 0.9})["verdict"] == "does not hold"


def test_a_difference_within_the_noise_is_undecided() -> None:
    assert verdict({"100": 0.6, "1000": 0.5}, 10 * SPREAD)["verdict"] == "undecided"
    assert verdict({"100": 0.6, "1000": 0.5}, np.array([-0.05, 0.05]))["verdict"] == "undecided"


def test_a_difference_has_to_be_over_the_margin() -> None:
    means = {"100": 0.9, "1000": 0.5}
    assert verdict(means, margin=0.3)["verdict"] == "holds"
    assert verdict(means, margin=0.4)["verdict"] == "undecided"
    assert verdict(means, margin=0.5)["verdict"] == "does not hold"


def test_similar_holds_only_where_the_whole_interval_is_within_the_margin() -> None:
    means = {"100": 0.9, "1000": 0.89}
    assert verdict(means, test="similar", margin=0.1)["verdict"] == "holds"
    assert verdict(means, test="similar", margin=0.02)["verdict"] == "undecided"
    assert verdict({"100": 0.5, "1000": 0.9}, test="similar", margin=0.1)["verdict"] == (
        "does not hold"
    )


def test_a_trend_holds_in_its_direction_alone() -> None:
    down = {"100": 0.9, "300": 0.7, "1000": 0.5}
    falling = verdict(down, test="falling", along="B")
    assert falling["verdict"] == "holds" and falling["effect"] == pytest.approx(0.4)
    assert verdict(down, test="rising", along="B")["verdict"] == "does not hold"
    up = {"100": 0.5, "300": 0.7, "1000": 0.9}
    rising = verdict(up, test="rising", along="B")
    assert rising["verdict"] == "holds" and rising["effect"] == pytest.approx(0.4)
    assert "B 1000 − B 100 > 0" in rising["test"]


def test_a_trend_does_not_hold_where_a_step_is_surely_reversed() -> None:
    dip = {"100": 0.9, "300": 0.4, "1000": 0.5}
    found = verdict(dip, test="falling", along="B")
    assert found["verdict"] == "does not hold" and found["effect"] == pytest.approx(0.4)
    assert "B 1000 is over B 300" in found["evidence"]
    assert verdict(dip, test="falling", along="B", margin=0.2)["verdict"] == "holds"
    assert verdict({**dip, "300": 0.495}, test="falling", along="B")["verdict"] == "holds"


def test_a_label_without_trials_leaves_a_trend_undecided_but_one_left_out_does_not() -> None:
    frame = study_frames.table(trials({"100": 0.9, "1000": 0.5}), ["reward", "B"])
    one = claim("falling", along="B", where={"reward": "R1"})
    found = decided(one, frame)
    assert found["verdict"] == "undecided" and "fewer than 2 trials of B 300" in found["evidence"]
    assert found["interval"] is None
    assert decided(one, frame, skip=({"B": "300"},))["verdict"] == "holds"


@pytest.mark.parametrize("count", [0, 1])
def test_an_arm_of_fewer_than_two_trials_is_undecided_and_says_so(count: int) -> None:
    finals = {("R1", "100"): [0.9, 0.8], ("R1", "1000"): [0.1, 0.1][:count]}
    found = decided(claim(), study_frames.table(finals, ["reward", "B"]))
    assert found["verdict"] == "undecided" and found["effect"] is None
    assert "B 1000" in found["evidence"] and found["n"]["B 1000"] == count


@pytest.mark.parametrize(
    ("second", "expected"),
    [(0.9, "holds"), (0.1, "does not hold"), (None, "undecided")],
)
def test_a_claim_for_each_label_holds_only_where_all_do(
    second: float | None, expected: str
) -> None:
    finals = trials({"100": 0.9, "1000": 0.5})
    if second is not None:
        finals |= trials({"100": second, "1000": 0.5}, reward="R2")
    found = decided(claim(each="reward"), study_frames.table(finals, ["reward", "B"]))
    assert found["verdict"] == expected
    assert [part["at"] for part in found["each"]] == ["R1", "R2"]
    assert found["each"][0]["verdict"] == "holds"
    if second == 0.1:
        assert found["effect"] == pytest.approx(-0.4)  # of the test that decided


def test_one_label_that_does_not_hold_outweighs_one_that_is_undecided() -> None:
    finals = trials({"100": 0.1, "1000": 0.5})
    found = decided(claim(each="reward"), study_frames.table(finals, ["reward", "B"]))
    assert found["verdict"] == "does not hold"


def test_trials_without_spread_decide_by_their_means() -> None:
    still = np.zeros(3)
    assert verdict({"100": 0.9, "1000": 0.5}, still)["verdict"] == "holds"
    assert verdict({"100": 0.5, "1000": 0.5}, still)["verdict"] == "does not hold"
    same = verdict({"100": 0.5, "1000": 0.5}, still, test="similar", margin=0.01)
    assert same["verdict"] == "holds" and same["interval"] == [0.0, 0.0]


def test_failed_trials_count_in_no_mean_and_are_counted() -> None:
    frame = study_frames.table(trials({"100": 0.9, "1000": 0.5}), ["reward", "B"])
    lost = pd.DataFrame(study_frames.failed({"reward": "R1", "B": "100"}, 9))
    found = decided(claim(), pd.concat([frame, lost]))
    without = decided(claim(), frame)
    assert found["interval"] == without["interval"]
    assert "1 failed" in found["evidence"] and "failed" not in without["evidence"]


def test_what_cannot_be_compared_is_undecided() -> None:
    frame = study_frames.table(trials({"100": 0.9, "1000": 0.5}), ["reward", "B"])
    shared = decided(claim(more={"B": "100"}, less={"reward": "R1"}), frame)
    assert shared["verdict"] == "undecided" and "in two arms" in shared["evidence"]
    frame.loc[frame["step"] == 60, "reward_eval"] = np.inf
    assert "not all values are finite" in decided(claim(), frame)["evidence"]
    assert "nothing measured" in decided(claim(metric="no_such"), frame)["evidence"]
    late = claim(take="steps_to", level=2.0)
    frame = study_frames.table(trials({"100": 0.9, "1000": 0.5}), ["reward", "B"])
    assert "no trial got to the level" in decided(late, frame)["evidence"]


def test_each_take_is_what_its_name_says() -> None:
    cell = {"B": "100"}
    frame = pd.DataFrame(
        study_frames.rows(cell, 0, [0.0, 0.9, 0.3, 0.6], seconds=5.0)
        + study_frames.rows(cell, 1, [0.0, np.nan, 0.2, np.nan], seconds=7.0)
        + study_frames.failed(cell, 2)
    )
    frame = frame.sample(frac=1.0, random_state=0)  # the order of rows says nothing

    def values(take: str) -> list[float]:
        found = scalars(frame, ["B"], "reward_eval", take, level=0.5).sort_values("seed")
        assert list(found["trial"]) == ["100-0", "100-1", "100-2"]
        return list(found["value"])

    nan = pytest.approx(np.nan, nan_ok=True)
    assert values("final") == [pytest.approx(0.6), pytest.approx(0.1), nan]
    assert values("mean") == [pytest.approx(0.45), pytest.approx(0.1), nan]
    assert values("best") == [0.9, 0.2, nan]
    assert values("steps_to") == [20, 60, nan]  # the second's length
    assert values("seconds_to") == [5, 7, nan]
    found = scalars(frame, ["B"], "reward_eval", "steps_to", level=0.5).sort_values("seed")
    assert list(found["reached"]) == [True, False, False]


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (8, 2.306), (30, 2.04227),
                       (1e9, 1.95996)],
)  # fmt: skip
def test_the_quantile_of_student_is_that_of_the_tables(freedom: float, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, rel=1e-4)


@pytest.mark.parametrize(("n", "scale"), [((5, 5), 1.0), ((5, 5), 10.0), ((3, 8), 4.0)])
def test_the_interval_has_the_true_difference_in_nineteen_of_twenty(
    n: tuple[int, int], scale: float
) -> None:
    rng = np.random.default_rng(0)
    found = [
        interval(0.3 + rng.normal(size=n[0]), scale * rng.normal(size=n[1])) for _ in range(1000)
    ]
    share = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert 0.93 < share < 0.98


def write(folder: Path, claims: tuple[Claim, ...], frame: pd.DataFrame) -> tuple[Study, Page]:
    study = study_frames.study(AXES, claims=claims, source="Figure 4")
    (folder / "figure.png").write_bytes(b"\x89PNG not looked at")
    path = page.write(decide(study, frame), folder, study, frame, "study small --seeds 5 <x>")
    return study, Page(path.read_text(encoding="utf-8"))


def test_the_page_has_every_claim_the_failed_trials_and_the_command(tmp_path: Path) -> None:
    frame = study_frames.table(trials({"100": 0.9, "1000": 0.5}), ["reward", "B"])
    lost = pd.DataFrame(
        study_frames.failed({"reward": "R2", "B": "300"}, 4, "TooManyFailures: <b>")
    )
    claims = (claim(each="reward"), claim(where={"reward": "R1"}))
    _, html = write(tmp_path, claims, pd.concat([frame, lost]))
    text = html.flat()
    assert "A <small> study" in text and "study small --seeds 5 <x>" in text
    assert "1 hold, 0 do not hold, 1 undecided" in text
    assert "R2-300-4 (reward R2, B 300, seed 4, TooManyFailures: <b>)" in text
    assert "not corrected" in text and "Fresher samples do better." in text
    assert "B 1000: 0.5 ± 0.0071 (n = 5)" in text
    images = [attributes["src"] for tag, attributes in html.tags if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/png;base64,")
    assert not [a for _, a in html.tags if a.get("src", "data:")[:5] != "data:"]


def test_claims_json_is_what_was_decided_without_nan(tmp_path: Path) -> None:
    frame = study_frames.table(trials({"100": 0.9}), ["reward", "B"])
    study, _ = write(tmp_path, (claim(),), frame)
    text = (tmp_path / "claims.json").read_text(encoding="utf-8")
    assert json.loads(text) == decide(study, frame) and "NaN" not in text


def test_a_study_whose_trials_all_failed_still_has_its_page(tmp_path: Path) -> None:
    cells = study_frames.study(AXES).cells
    frame = pd.DataFrame([row for cell in cells for row in study_frames.failed(cell, 0)])
    _, html = write(tmp_path, (claim("falling", along="B", each="reward"),), frame)
    assert "6 failed trials" in html.flat() and "1 undecided" in html.flat()
