"""The report's plots: matplotlib drawings as SVG that takes its colours from the page's CSS."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cluster.report.data import Run
from cluster.thinning import thin

BARS = 40  # most bars of a histogram
LARGE, SMALL = (4.2, 3.0), (3.3, 2.5)  # inches; only their proportions to the text matter
# Colours that are replaced by CSS variables once the SVG is written.
INK, LINE, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "--ink", LINE: "--line", FIRST: "--first", SECOND: "--second"}
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "onpolicy", "font.size": 10.5,
         "axes.spines.top": False, "axes.spines.right": False, "text.usetex": False,
         "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE,
         "xtick.color": LINE, "ytick.color": LINE,
         "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": LINE,
         "grid.linewidth": 0.5, "grid.alpha": 0.6, "axes.grid": True, "axes.axisbelow": True,
         "axes.unicode_minus": True}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A figure of the page. svg: None where there is nothing to draw, and `note` says why."""

    title: str
    svg: Markup | None
    legend: tuple[tuple[str, str], ...] = ()  # (label, name of the colour in CSS)
    note: str = ""
    small: bool = False


def plots(run: Run) -> list[Plot]:
    """Every plot of the report, in the order in which they stand on the page."""
    history = {name: np.array(column) for name, column in run.history.items()}
    window = run.steps_per_round or max(1, len(history["step"]) // 50)
    return [
        _reward(history, run.summary.get("reward_initial"), window),
        *_gold(history, run.summary),
        _generator(history, window),
        _trade_off(history, run.summary.get("reward_initial")),
        _histogram("Age at consumption", "age (optimizer steps)", run.summary.get("age"),
                   "No age: nothing consumed yet, or offline rollouts, which have none."),
        _histogram("Reuse", "reuse (this consumption included)", run.summary.get("reuse"),
                   "Nothing consumed yet."),
        _curve("Loss", "loss", "loss", history, window),
        _curve("Effective sample size", "ESS / n", "ess", history, window),
    ]  # fmt: skip


def _reward(history: dict[str, Any], initial: float | None, window: int) -> Plot:
    step, reward, mean = history["step"], history["reward_eval"], history["reward_mean"]
    error = history["reward_eval_error"]
    if not np.isfinite(reward).any() and not np.isfinite(mean).any():
        return Plot("Reward", None, note="No reward yet.")
    if initial is not None:
        step_eval, reward = np.r_[0.0, step], np.r_[float(initial), reward]
        error = np.r_[np.nan, error]
    else:
        step_eval = step

    def paint(axes: Axes) -> None:
        _series(axes, step, mean, SECOND, window)
        known = np.isfinite(reward)
        x, y, e = step_eval[known], reward[known], np.nan_to_num(error[known])
        axes.fill_between(x, y - e, y + e, color=FIRST, alpha=0.2, linewidth=0)
        axes.plot(x, y, color=FIRST, marker="o" if len(x) <= 60 else "", markersize=3)
        axes.set(xlabel="step", ylabel="reward")

    legend = (("reward_eval", "first"), ("reward_mean (training)", "second"))
    note = "" if np.isfinite(history["reward_eval"]).any() else "No evaluation in this run yet."
    return Plot("Reward", _svg("reward", paint), legend, note)


def _gold(history: dict[str, Any], summary: dict[str, Any]) -> list[Plot]:
    """Proxy and gold reward, each on an axis of its own; nothing where there is no gold reward."""
    pairs = ("reward_eval", "reward_initial", FIRST), ("reward_gold", "reward_gold_initial", SECOND)
    known = [np.isfinite(history[name]) for name, *_ in pairs]
    if not known[1].any():
        return []

    def paint(axes: Axes) -> None:
        for side, (name, start, colour), have in zip((axes, axes.twinx()), pairs, known):
            x, y, e = (history[column][have] for column in ("step", name, f"{name}_error"))
            if (first := summary.get(start)) is not None:
                x, y, e = np.r_[0.0, x], np.r_[float(first), y], np.r_[np.nan, e]
            side.errorbar(x, y, np.nan_to_num(e), color=colour, marker="o", markersize=3,
                          elinewidth=0.7)  # fmt: skip
            side.set_ylabel(name, color=colour)
            side.spines["right"].set_visible(side is not axes)
        axes.set_xlabel("step")

    legend = (("reward_eval (proxy), left", "first"), ("reward_gold, right", "second"))
    note = "Trained on the proxy alone: where it rises and gold falls, it is over-optimised."
    return [Plot("Proxy and gold reward", _svg("gold", paint), legend, note)]


def _generator(history: dict[str, Any], window: int) -> Plot:
    title = "KL to the generating policy"
    to, back = history["kl_to_generator"], history["kl_from_generator"]
    if not np.isfinite(to).any() and not np.isfinite(back).any():
        return Plot(title, None, note="Not measured: the generating policy is not known.")

    def paint(axes: Axes) -> None:
        _series(axes, history["step"], back, SECOND, window)
        _series(axes, history["step"], to, FIRST, window)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_ylim(bottom=0)

    legend = (("KL(π_θ‖π_gen)", "first"), ("KL(π_gen‖π_θ)", "second"))
    return Plot(title, _svg("generator", paint), legend, _faint(window))


def _trade_off(history: dict[str, Any], initial: float | None) -> Plot:
    """reward_eval against KL to π_ref: of the evaluation's rollouts where it was measured there."""
    title = "KL–reward trade-off"
    reward, kl = history["reward_eval"], history["eval_kl_to_reference"]
    kl = np.where(np.isfinite(kl), kl, history["kl_to_reference"])
    known = np.isfinite(reward) & np.isfinite(kl)
    if not known.any():
        return Plot(title, None, note="No evaluation with a KL to the reference policy.")
    x, y = kl[known], reward[known]
    if initial is not None:
        x, y = np.r_[0.0, x], np.r_[float(initial), y]

    def paint(axes: Axes) -> None:
        axes.plot(x, y, color=FIRST, linewidth=0.8, alpha=0.5)
        axes.scatter(x, y, s=10, color=FIRST)
        axes.scatter(x[-1:], y[-1:], s=45, facecolor="none", edgecolor=SECOND, linewidth=1.5)
        axes.set(xlabel="KL to π_ref (nats per token)", ylabel="reward_eval")

    return Plot(title, _svg("trade", paint), (("evaluations", "first"), ("last one", "second")))


def _histogram(title: str, label: str, table: Any, nothing: str) -> Plot:
    histogram = (table or {}).get("histogram") or {}
    counts = {int(value): int(count) for value, count in histogram.items()}
    if not counts:
        return Plot(title, None, note=nothing, small=True)
    first, last = min(counts), max(counts)
    width = -(-(last - first + 1) // BARS)
    bars: dict[int, int] = {}
    for value, count in counts.items():
        start = first + (value - first) // width * width
        bars[start] = bars.get(start, 0) + count

    def paint(axes: Axes) -> None:
        centres = [start + (width - 1) / 2 for start in bars]
        axes.bar(centres, list(bars.values()), width=0.86 * width, color=FIRST)
        axes.set(xlabel=label, ylabel="rollouts consumed")
        axes.set_xlim(first - 0.6, max(start + width - 1 for start in bars) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(False, axis="x")

    note = f"mean {table['mean']:.3g}, max {last}" if table.get("mean") is not None else ""
    return Plot(title, _svg(title.split()[0].lower(), paint, SMALL), note=note, small=True)


def _curve(title: str, label: str, name: str, history: dict[str, Any], window: int) -> Plot:
    if not np.isfinite(history[name]).any():
        return Plot(title, None, note="Not measured in this run.", small=True)

    def paint(axes: Axes) -> None:
        _series(axes, history["step"], history[name], FIRST, window)
        axes.set(xlabel="step", ylabel=label)

    return Plot(title, _svg(name, paint, SMALL), note=_faint(window), small=True)


def _faint(window: int) -> str:
    return f"Faint: every step. Bold: mean over {window} steps." if window > 1 else ""


def _series(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, window: int) -> None:
    """A curve: each step faintly, and its moving mean over `window` steps."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    window = max(1, min(window, len(x) // 4))
    smooth = window > 1
    axes.plot(*thin(x, y), color=colour, linewidth=0.7 if smooth else 1.2,
              alpha=0.3 if smooth else 1.0)  # fmt: skip
    if smooth:
        even = np.ones(window) / window
        mean_x, mean_y = (np.convolve(values, even, mode="valid") for values in (x, y))
        axes.plot(*thin(mean_x, mean_y), color=colour, linewidth=1.6)


def _svg(name: str, paint: Callable[[Axes], None], size: tuple[float, float] = LARGE) -> Markup:
    """Draw on fresh axes; return SVG without fixed size, ids of other plots, or addresses."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head)
    head = head.replace("<svg", f'<svg role="img" aria-label="{name}"')
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return Markup(f"{head}>{body}")
