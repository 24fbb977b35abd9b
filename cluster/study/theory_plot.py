"""The figure of the study `theory`: mass over steps of both divergences, and failure rates."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

Array = NDArray[np.float64]
INK, SOFT, PALE = "#1d2430", "#5c6675", "#c9d0da"
COLOURS = {"forward": "#1f6fd6", "reverse": "#d9722b"}
LABELS = {"forward": "forward KL(q‖p)", "reverse": "reverse KL(p‖q)"}
SHOWN = (5, 20, 100)  # steps at which the whole distribution is drawn
WATCHED = {6: "start's mode", 11: "target's near side", 13: "target's mode"}  # categories
STYLE: Any = {"font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT,
         "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
         "axes.grid": True, "axes.grid.axis": "y", "grid.color": PALE, "grid.linewidth": 0.5,
         "legend.frameon": False, "legend.fontsize": 9}  # fmt: skip


def draw(
    file: Path, paths: dict[str, Array], target_K: Array, claims: list[dict[str, Any]]
) -> None:
    """Write the figure as PNG. paths: p over steps of each divergence, [steps + 1, K]."""
    with matplotlib.rc_context(STYLE):
        spaced = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure: Any = Figure(figsize=(12.5, 6.8), layout=spaced)
        top, bottom = figure.subfigures(2, 1)
        _title(top, "Reverse KL leaves the start sooner and overfills the target's near side;"
                    " forward KL reaches the target's mode sooner")  # fmt: skip
        for i, (axes, at) in enumerate(zip(top.subplots(1, 3, sharey=True), SHOWN)):
            _distributions(axes, paths, target_K, at)
            if i == 0:
                axes.set_ylabel("probability")
                axes.legend(loc="upper left")
        left, right = bottom.subfigures(1, 2, width_ratios=(2, 1))
        _title(left, "Mass of three categories over steps, at one learning rate")
        for axes, category in zip(left.subplots(1, 3, sharey=True), WATCHED):
            _mass(axes, paths, target_K, category)
        informal = [claim for claim in claims if claim["name"].endswith("informal")]
        _title(right, "How often Theorem 5.2's words alone fail")
        _failures(right.subplots(), informal)
        figure.savefig(file, dpi=150, facecolor="white", metadata={"Software": None})


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, weight="bold")


def _distributions(axes: Axes, paths: dict[str, Array], target_K: Array, at: int) -> None:
    x_K = np.arange(len(target_K))
    axes.bar(x_K, target_K, width=0.86, color=PALE, label="target q")
    axes.plot(x_K, paths["forward"][0], color=SOFT, linewidth=1, linestyle=":", label="start")
    for divergence, path_TK in paths.items():
        axes.plot(x_K, path_TK[at], color=COLOURS[divergence], linewidth=1.7, marker="o",
                  markersize=3.2, label=LABELS[divergence])  # fmt: skip
    axes.set(title=f"after {at} steps", xlabel="category")
    axes.set_xticks(x_K[::2])


def _mass(axes: Axes, paths: dict[str, Array], target_K: Array, category: int) -> None:
    for divergence, path_TK in paths.items():
        axes.plot(path_TK[:, category], color=COLOURS[divergence], linewidth=1.7)
    axes.axhline(target_K[category], color=SOFT, linewidth=1, linestyle="--")
    axes.text(0.1, target_K[category] + 0.004, "target", color=SOFT, fontsize=8.5)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, len(paths["forward"]) - 1)
    axes.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axes.set_ylim(0, 1.05 * max(path_TK[:, list(WATCHED)].max() for path_TK in paths.values()))
    axes.set(title=f"{category}: {WATCHED[category]}", xlabel="step")
    if category == min(WATCHED):
        axes.set_ylabel("probability")


def _failures(axes: Axes, claims: list[dict[str, Any]]) -> None:
    """A bar per informal statement: its failure rate, with the interval."""
    rate_C = np.array([100 * claim["effect"] for claim in claims])
    low_C, high_C = (100 * np.array([claim["interval"][i] for claim in claims]) for i in (0, 1))
    bars = axes.bar(range(len(claims)), rate_C, width=0.6, color=SOFT)
    error = np.maximum(0, [rate_C - low_C, high_C - rate_C])
    axes.errorbar(range(len(claims)), rate_C, error, fmt="none", ecolor=INK, capsize=4)
    for bar, rate, high, claim in zip(bars, rate_C, high_C, claims):
        text = f"{rate:.1f} %\nof {claim['n']:,}"
        axes.text(bar.get_x() + bar.get_width() / 2, high + 1.2, text, ha="center", fontsize=9)
    names = ("case 1\np₁ = p₂, q₁ > q₂", "case 2\np₂ < p₁ < q", "case 3\nq < p₂ < p₁")
    axes.set_xticks(range(len(claims)), names[: len(claims)])
    axes.set_ylim(0, max(10, high_C.max() * 1.25))
    axes.set_ylabel("random draws that contradict it (%)")
