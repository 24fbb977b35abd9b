"""figure.png of a study: a row of panels for each of its figures, from its evaluations."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from cluster.study.spec import Cell, Figure, Study
from cluster.study.style import BLANK, GREY, INK, STYLE, colours, name
from cluster.study.take import labels_of, rows_of, scalars, until
from cluster.study.welch import mean_and_error, standard_error
from cluster.wording import number

PANEL = (3.3, 2.5)  # inches
DOTS = 200  # per inch
SHADE = 0.18  # opacity of a standard error
ROOM = 44  # letters below a panel


class Panel(NamedTuple):
    """What one panel is drawn from."""

    study: Study
    figure: Figure
    frame: pd.DataFrame  # rows of finished trials, and no others
    labels: list[str]  # of the axis `lines`


def draw(study: Study, frame: pd.DataFrame, path: Path) -> None:
    """Write the study's figures as one PNG; nothing for a study without figures.

    A panel without a finished trial says so.
    """
    finished = frame[frame["status"] == "finished"].replace([np.inf, -np.inf], np.nan)
    rows = [_panels(study, figure, finished) for figure in study.figures]
    if not rows:
        return
    columns = max(len(row) for row in rows)
    size = (max(PANEL[0] * columns + 1.2, 4.5), PANEL[1] * len(rows) + 0.5)
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=size, layout="constrained")
        grid = drawing.subplots(len(rows), columns, squeeze=False)
        done: set[str] = set()  # axes that have a legend
        for figure, row, places in zip(study.figures, rows, grid):
            for axes in places[len(row) :]:
                axes.remove()
            _row(drawing, figure, row, list(places[: len(row)]))
            if figure.kind == "curves" and figure.lines not in done:
                done.add(figure.lines)
                _legend(places[len(row) - 1], study, figure.lines)
        width = int(size[0] * 12)
        drawing.suptitle("\n".join(textwrap.wrap(study.title, width)), fontsize=10.5)
        drawing.savefig(path, dpi=DOTS, format="png", metadata={"Software": None})


def _panels(study: Study, figure: Figure, frame: pd.DataFrame) -> dict[str, Panel]:
    """A row's panels by their titles, the labels that it is restricted to."""
    places: list[Cell] = [figure.where]
    if figure.panels:
        labels = labels_of(study, figure.panels, figure.where)
        places = [{**figure.where, figure.panels: label} for label in labels]
    titles = [", ".join(f"{axis} {label}" for axis, label in p.items()) for p in places]
    return {
        title: Panel(study, figure, rows_of(frame, p), labels_of(study, figure.lines, p))
        for title, p in zip(titles, places)
    }


def _row(drawing: Drawing, figure: Figure, row: dict[str, Panel], places: list[Axes]) -> None:
    heat = figure.kind == "heat"
    scale = _scale(list(row.values())) if heat else None
    if not heat:
        _share(places)
    images: list[Any] = []
    reasons = [_missing(panel) for panel in row.values()]
    for axes, (title, panel) in zip(places, row.items()):
        axes.set_title(title)
        if figure.kind == "curves":
            axes.set_xlabel(name(figure.x), parse_math=True)
        else:
            axes.set_xlabel(figure.x if heat else figure.lines)
        reason = _missing(panel)
        if reason:
            _say(axes, reason, bare=heat or all(reasons))
        elif heat:
            images.append(_heat(axes, panel, scale))
        elif figure.kind == "bars":
            _bars(axes, panel)
        else:
            _curves(axes, panel)
    if not heat:
        places[0].set_ylabel(_quantity(figure), parse_math=True)
        _limits(places[0], figure, [panel.frame for panel in row.values()])
        return
    places[0].set_ylabel(figure.lines)
    if images:
        beside = drawing.colorbar(images[-1], ax=places, shrink=0.9)
        beside.set_label(_quantity(figure), parse_math=True)


def _share(places: list[Axes]) -> None:
    """One scale for the panels of a row, with its numbers at the first."""
    for axes in places[1:]:
        axes.sharex(places[0])
        axes.sharey(places[0])
        axes.tick_params(labelleft=False)


def _missing(panel: Panel) -> str:
    """Why there is nothing to draw; empty where there is something."""
    if panel.frame.empty:
        return "no finished trial"
    needs = [panel.figure.y, *([panel.figure.x] if panel.figure.kind == "curves" else [])]
    absent = [m for m in needs if m not in panel.frame or panel.frame[m].isna().all()]
    return f"{absent[0]} was not measured" if absent else ""


def _say(axes: Axes, text: str, bare: bool) -> None:
    """Words in place of a drawing. bare: without a scale, as no panel beside it has one."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    if bare:
        axes.set(xticks=[], yticks=[])


def _curves(axes: Axes, panel: Panel) -> None:
    x, y = panel.figure.x, panel.figure.y
    for label, colour in colours(panel.study, panel.figure.lines).items():
        rows = rows_of(panel.frame, {panel.figure.lines: label})
        rows = rows.dropna(subset=[x, y]).sort_values("step")
        if rows.empty:
            continue
        by_step = rows.groupby("step")
        points, error = by_step[y].mean(), by_step[y].sem()
        if x == "step":
            axes.plot(points.index, points, color=colour)
            low, high = points - error, points + error  # NaN, so no shade, for a single seed
            axes.fill_between(points.index, low, high, color=colour, alpha=SHADE, linewidth=0)
            continue
        across, spread = by_step[x].mean(), by_step[x].sem()
        axes.plot(across, points, color=colour, marker="o", markersize=2.2, linewidth=1)
        last = dict(xerr=spread.iloc[-1:], yerr=error.iloc[-1:], ecolor=colour, elinewidth=0.9)
        axes.errorbar(across.iloc[-1:], points.iloc[-1:], **last, fmt="o", color=colour,
                      markersize=7, markeredgecolor="white", zorder=5)  # fmt: skip


def _limits(axes: Axes, figure: Figure, frames: list[pd.DataFrame]) -> None:
    """Of all panels of a row, once they are drawn. A line at a divergence of 0 is to be seen."""
    if figure.kind != "curves":
        return
    if figure.y.startswith("kl_"):
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=min(low, -0.02 * high))
    ends = [frame["step"].max() for frame in frames if not frame.empty]
    if figure.x == "step" and ends:
        axes.set_xlim(-0.02 * max(ends), 1.02 * max(ends))


def _cells(panel: Panel, across: Sequence[str] = ("",)) -> dict[tuple[str, str], pd.DataFrame]:
    """What `scalars` gives, for each label of `lines` and each of the axis `x`."""
    figure = panel.figure
    trials = scalars(panel.frame, panel.study.axes, figure.y, figure.take, figure.level).dropna(
        subset=["value"]
    )
    return {
        (label, column): rows_of(
            trials, {figure.lines: label} | ({figure.x: column} if column else {})
        )
        for label in panel.labels
        for column in across
    }


def _scale(panels: list[Panel]) -> Normalize:
    """One scale of colours for all panels of a row."""
    every = [
        float(trials["value"].mean())
        for panel in panels
        for trials in _cells(panel, _across(panel)).values()
        if len(trials)
    ]
    return Normalize(min(every, default=0.0), max(every, default=1.0))


def _across(panel: Panel) -> list[str]:
    return labels_of(panel.study, panel.figure.x, panel.figure.where)


def _heat(axes: Axes, panel: Panel, scale: Normalize | None) -> Any:
    columns = _across(panel)
    cells = {place: trials["value"].to_numpy() for place, trials in _cells(panel, columns).items()}
    means = np.array([
        [cells[label, c].mean() if len(cells[label, c]) else np.nan for c in columns]
        for label in panel.labels
    ])  # fmt: skip
    image = axes.imshow(means, cmap="YlGnBu", norm=scale, aspect="auto")
    axes.set_facecolor(BLANK)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(panel.labels)), [_with_age(panel, label) for label in panel.labels])
    for (i, label), (j, column) in (
        (row, cell) for row in enumerate(panel.labels) for cell in enumerate(columns)
    ):
        values, mean = cells[label, column], means[i, j]
        dark = np.isfinite(mean) and sum(image.cmap(image.norm(mean))[:3]) < 1.5
        said = mean_and_error(values, "\n± ") if len(values) else "–"
        axes.text(j, i, said, ha="center", va="center", fontsize=8,
                  color="white" if dark else INK)  # fmt: skip
    return image


def _with_age(panel: Panel, label: str) -> str:
    """A row's label, and the mean age of its trials' samples, at their first use where known."""
    rows = rows_of(panel.frame, {panel.figure.lines: label})
    for age in ("age_first", "age"):
        if age in rows and rows[age].notna().any():
            return f"{label}\nage {number(round(float(rows[age].mean()), 2))}"
    return label


def _bars(axes: Axes, panel: Panel) -> None:
    named = colours(panel.study, panel.figure.lines)
    for place, ((label, _), trials) in enumerate(_cells(panel).items()):
        values, reached = trials["value"].to_numpy(), trials["reached"].to_numpy()
        if not len(values):
            axes.text(place, 0, "–", ha="center", va="bottom", color=GREY)
            continue
        error = standard_error(values) if len(values) > 1 else None
        axes.bar(place, values.mean(), width=0.72, color=named[label], alpha=0.75, yerr=error,
                 error_kw={"ecolor": INK, "elinewidth": 1.1, "capsize": 3})  # fmt: skip
        at = place + (np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1))
        for which, marker in ((reached, "o"), (~reached, "^")):
            if not which.any():
                continue
            axes.scatter(at[which], values[which], s=11 if marker == "o" else 20, marker=marker,
                         color="white", edgecolor=INK, linewidth=0.7, zorder=3)  # fmt: skip
    room = ROOM // len(panel.labels)
    words = [textwrap.fill(label, room, break_long_words=False) for label in panel.labels]
    long = any(len(line) > room for label in words for line in label.split("\n"))
    turned: Any = dict(rotation=30, ha="right", rotation_mode="anchor") if long else {}
    axes.set_xticks(range(len(panel.labels)), panel.labels if long else words, **turned)
    axes.grid(False, axis="x")


def _legend(axes: Axes, study: Study, axis: str) -> None:
    """What each colour is, at the right of a row's last panel."""
    named = colours(study, axis)
    handles = [Line2D([], [], color=named[label], label=label) for label in study.axes[axis]]
    axes.legend(handles=handles, title=axis, frameon=False, loc="upper left",
                bbox_to_anchor=(1.0, 1.02))  # fmt: skip


def _quantity(figure: Figure) -> str:
    """What is drawn of a trial, as a label of an axis."""
    if figure.kind == "curves":
        return name(figure.y)
    said = until(figure.y, figure.level).get(figure.take, f"{figure.take} {name(figure.y)}")
    return said.replace(" until ", "\nuntil ")
