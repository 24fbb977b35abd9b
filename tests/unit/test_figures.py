"""A study's figures: a panel for each label, a line for each label, whatever trials there are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure as Drawing

from cluster.study import figures
from cluster.study.spec import Figure, Study
from cluster.study.style import colours
from tests.unit import study_frames

AXES = {"reward": ["R1", "R2"], "B": ["100", "300", "1000"], "T": ["1", "5"]}
CURVES = Figure("curves", "reward_eval", "B", panels="reward")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Draw, check that a PNG was written, and return the panels, row by row."""
    kept: list[Drawing] = []
    monkeypatch.setattr(figures, "DOTS", 40)
    save = Drawing.savefig
    monkeypatch.setattr(
        Drawing, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1]
    )

    def draw(study: Study, frame: pd.DataFrame) -> list[Axes]:
        path = tmp_path / "figure.png"
        figures.draw(study, frame, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return [axes for axes in kept[-1].axes if axes.get_label() != "<colorbar>"]

    yield draw


def grid(seeds: int = 3, **columns: Any) -> pd.DataFrame:
    """Every cell's trials: a reward that the cell and, a little, the seed decide."""
    rng = np.random.default_rng(0)
    rows = []
    for number, cell in enumerate(study_frames.study(AXES).cells):
        for seed in range(seeds):
            end = 0.5 + 0.03 * number + 0.01 * rng.normal()
            rows += study_frames.rows(cell, seed, [0.0, end / 2, end, end], **columns)
    return pd.DataFrame(rows)


def study(*what: Figure, **fields: Any) -> Study:
    return study_frames.study(AXES, figures=what, **fields)


def lines(axes: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata())]


def said(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_curve_is_the_mean_over_trials_and_its_shade_the_standard_error(drawn) -> None:
    frame = grid()
    first, second = drawn(study(CURVES), frame)
    assert (first.get_title(), second.get_title()) == ("reward R1", "reward R2")
    at = frame[(frame["reward"] == "R1") & (frame["B"] == "100")].groupby("step")["reward_eval"]
    np.testing.assert_allclose(lines(first)[0], at.mean())
    (shade,) = first.collections[0].get_paths()
    assert shade.vertices[:, 1].max() == pytest.approx((at.mean() + at.sem()).max())
    assert len(lines(first)) == len(lines(second)) == 3
    assert first.get_ylim() == second.get_ylim() and first.get_xlim() == second.get_xlim()


def test_the_legend_stands_once_for_each_axis_of_lines(drawn) -> None:
    other = Figure("curves", "reward_eval", "T", panels="reward")
    panels = drawn(study(CURVES, CURVES, other), grid())
    legends = [axes.get_legend() for axes in panels if axes.get_legend()]
    assert [legend.get_title().get_text() for legend in legends] == ["B", "T"]
    assert [text.get_text() for text in legends[0].get_texts()] == AXES["B"]


def test_a_single_seed_has_curves_without_a_shade(drawn) -> None:
    frame = grid(seeds=1)
    one = frame[frame["T"] == "1"]
    panel, _ = drawn(study(CURVES), one)
    assert len(lines(panel)) == 3
    assert not [p for shade in panel.collections for p in shade.get_paths() if len(p.vertices)]


def test_a_panel_without_a_finished_trial_says_so(drawn) -> None:
    frame = grid()
    lost = pd.DataFrame(study_frames.failed({"reward": "R2", "B": "100", "T": "1"}, 0))
    frame = pd.concat([frame[frame["reward"] == "R1"], lost])
    heat = Figure("heat", "reward_eval", "B", x="T", panels="reward")
    bars = Figure("bars", "reward_eval", "B", panels="reward")
    for kind in (CURVES, heat, bars):
        first, second = drawn(study(kind), frame)
        assert said(second) == ["no finished trial"] != said(first)
    for kind in (CURVES, heat, bars):
        assert all(said(a) == ["no finished trial"] for a in drawn(study(kind), lost))
    unknown = Figure("curves", "ess", "B")
    assert said(drawn(study(unknown), frame)[0]) == ["ess was not measured"]


def test_a_trade_off_goes_by_step_and_its_end_is_marked(drawn) -> None:
    frame = grid()
    frame["eval_kl_to_reference"] = np.where(frame["step"] == 60, 1.0, frame["step"] / 10)
    panel = drawn(study(Figure("curves", "reward_eval", "B", x="eval_kl_to_reference")), frame)[0]
    path = panel.get_lines()[0]
    np.testing.assert_allclose(path.get_xdata(), [0.0, 2.0, 4.0, 1.0])
    ends = [line for line in panel.get_lines() if len(line.get_xdata()) == 1]
    assert {float(line.get_xdata()[0]) for line in ends if line.get_marker() == "o"} == {1.0}


def test_cells_of_a_heat_map_say_their_mean_and_error_and_rows_their_age(drawn) -> None:
    frame = grid(age=4.0, age_first=2.5)
    frame = frame[~((frame["B"] == "1000") & (frame["T"] == "5"))]
    heat = Figure("heat", "reward_eval", "B", x="T", where={"reward": "R1"})
    (panel,) = drawn(study(heat), frame)
    texts = said(panel)
    assert len(texts) == 6 and texts.count("–") == 1
    final = frame[(frame["step"] > 0) & (frame["reward"] == "R1") & (frame["T"] == "1")]
    mean = final[final["B"] == "100"].groupby("trial")["reward_eval"].mean()
    assert texts[0] == f"{mean.mean():.3g}\n± {mean.sem():.2g}"
    assert panel.get_yticklabels()[0].get_text() == "100\nage 2.5"
    (panel,) = drawn(study(heat), frame.drop(columns=["age", "age_first"]))
    assert panel.get_yticklabels()[0].get_text() == "100"


def test_bars_have_a_point_for_each_trial_and_a_triangle_where_it_never_got_there(drawn) -> None:
    bars = Figure("bars", "reward_eval", "B", take="steps_to", where={"reward": "R1", "T": "1"})
    frame = grid()
    frame.loc[(frame["B"] == "300") & (frame["step"] == 40), "reward_eval"] = 0.99
    (panel,) = drawn(study(bars), frame)
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == [60, 40, 60]
    points = [c for c in panel.collections if isinstance(c, PathCollection)]
    corners = [(len(c.get_offsets()), len(c.get_paths()[0].vertices)) for c in points]
    (three, triangle), (also, circle), _ = corners
    assert (three, also, len(corners)) == (3, 3, 3) and triangle < circle
    assert "until reward_eval ≥ 0.95" in panel.get_ylabel()


def test_labels_that_are_numbers_go_from_dark_to_light_and_others_are_told_apart() -> None:
    named = study_frames.study({"B": ["1000", "100", "3e2"], "method": ["PPO", "IPO", "RWR"]})
    light = {label: sum(colour[:3]) for label, colour in colours(named, "B").items()}
    assert light["100"] < light["3e2"] < light["1000"]
    assert len(set(colours(named, "method").values())) == 3
    many = study_frames.study({"method": [f"m{i}" for i in range(12)]})
    assert len(set(colours(many, "method").values())) == 12


def test_a_divergence_that_is_not_finite_is_left_out_and_text_is_drawn_as_it_is(drawn) -> None:
    frame = grid(kl_to_generator=0.1)
    frame.loc[frame["step"] == 40, "kl_to_generator"] = np.inf
    named = study_frames.study({**AXES, "B": ["$x$_{", "$$\\frac", "1"]}, figures=(
        Figure("curves", "kl_to_generator", "B"),))  # fmt: skip
    frame["B"] = frame["B"].map(dict(zip(AXES["B"], named.axes["B"])))
    (panel,) = drawn(named, frame)
    assert all(np.isfinite(values).all() for values in lines(panel))


def test_a_study_without_figures_draws_none(tmp_path: Path) -> None:
    figures.draw(study(), grid(1), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
