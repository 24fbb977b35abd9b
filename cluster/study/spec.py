"""What a study is, as its file under configs/studies/ says it, checked before the first trial.

title: On-policy best-of-N, reward and divergence for several batch sizes
source: Figure 4, Section 4.1
preset: bandit_best_of_n
settings: [learner.updates=600]        # of every trial
axes:                                  # a cell takes one value of each; values are settings
  reward: {R1: [reward.centre=70], R2: [reward.centre=20]}
  B: {"100": [replay.samples_per_round=100], "500": [replay.samples_per_round=500]}
skip: [{reward: R2, B: "500"}]         # cells left out
seeds: 5
search: {per: [reward], at: {B: "100"}, updates: 160}
figures: [{kind: curves, x: step, y: reward_eval, panels: reward, lines: B}]
claims: [...]                          # `Claim`
quick: {seeds: 1, settings: [learner.updates=60], axes: {B: ["100"]}}
"""

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from configs.errors import ConfigError
from configs.load import prepare
from configs.schema import Config
from configs.yaml_files import read_mapping

STUDIES = Path(__file__).parents[2] / "configs" / "studies"
Cell = dict[str, str]  # axis → label of its value


@dataclass(frozen=True)
class Search:
    """Learning rates, by successive halving, once for each combination of the axes `per`.

    at: labels of the other axes while searching (the first of each where not given). updates: of
    a run in the last of the `rungs`; each rung before has half of the next one's. score: what the
    best rate has most of, the `last` reward_eval, or the `mean` of all, where it is speed that is
    compared.
    """

    per: tuple[str, ...] = ()
    at: dict[str, str] = field(default_factory=dict)
    updates: int = 200
    rungs: int = 3
    score: str = "last"
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Figure:
    """A row of panels of figure.png.

    kind: `curves` (y against x for each label of `lines`; x: step, or a metric), `heat` (final y
    over the axes `x` and `lines`) or `bars` (final y for each label of `lines`). panels: the axis
    with a panel for each label; where: labels of axes that it is restricted to.
    """

    kind: str
    y: str
    lines: str
    x: str = "step"
    panels: str = ""
    where: dict[str, str] = field(default_factory=dict)
    take: str = "final"  # heat and bars: what of a trial, as in `Claim`
    level: float = 0.95


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as a test over seeds.

    test: `greater` (mean of `metric` in cells `more` over those in `less` by over `margin`),
    `similar` (their difference is within ± margin), `rising` or `falling` (along the axis `along`,
    from each label to the next, by over margin from the first to the last).
    take: what of a trial: `final` (mean of its last three evaluations), `mean` (of all),
    `best`, `steps_to`, `seconds_to` and `queries_to` (updates, seconds of training and reward
    queries until the metric reaches `level`; the whole run's where never).
    each: an axis at whose every label the claim is tested; it holds if it does at all of them.
    """

    name: str
    section: str
    says: str  # the paper's sentence, in our own words
    test: str
    metric: str = "reward_eval"
    take: str = "final"
    level: float = 0.95
    more: dict[str, str] = field(default_factory=dict)
    less: dict[str, str] = field(default_factory=dict)
    along: str = ""
    where: dict[str, str] = field(default_factory=dict)
    each: str = ""
    margin: float = 0.0


@dataclass(frozen=True)
class Study:
    """A grid of runs, and what is drawn and decided from it."""

    name: str
    title: str
    preset: str
    axes: dict[str, dict[str, tuple[str, ...]]]
    source: str = ""
    settings: tuple[str, ...] = ()
    skip: tuple[dict[str, str], ...] = ()
    seeds: int = 5
    search: Search | None = None
    figures: tuple[Figure, ...] = ()
    claims: tuple[Claim, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        """Every cell of the grid that is not left out, in the order of the file."""
        every = (dict(zip(self.axes, labels)) for labels in itertools.product(*self.axes.values()))
        return [c for c in every if not any(s.items() <= c.items() for s in self.skip)]

    def settings_of(self, cell: Cell) -> list[str]:
        """A cell's settings, those of every trial first."""
        own = (self.axes[axis][label] for axis, label in cell.items())
        return [*self.settings, *itertools.chain(*own)]

    def prepare(self, cell: Cell, *more: str) -> Config:
        """A cell's settings as a run takes them. ConfigError names the cell where there are none
        that work."""
        try:
            return prepare(self.preset, [*self.settings_of(cell), *more])
        except ConfigError as error:
            named = ", ".join(f"{axis} {label}" for axis, label in cell.items()) or "only cell"
            problem = f"study {self.name}, cell {named}: {error.problem}"
            raise ConfigError(error.key, error.value, problem, error.fix) from error


def load(name: str, quick: bool = False, seeds: int = 0) -> Study:
    """A study by its name in configs/studies/ or its file; every cell is checked.

    quick: with what the file's `quick` says. seeds: 0 for the file's.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in STUDIES.glob("*.yaml")))
        raise ConfigError("study", name, "no such study", f"take theory, {known} or a YAML file")
    tree = {"name": path.stem, **read_mapping(path, "study")}
    less = tree.pop("quick", {})
    study: Study = _build(Study, tree, path.stem)
    _check(study)
    if quick:
        _make_quick(tree, less)
        study = _build(Study, tree, path.stem)
    study = dataclasses.replace(study, seeds=seeds) if seeds else study
    for cell in study.cells:
        study.prepare(cell)
    return study


def _make_quick(tree: dict[str, Any], less: dict[str, Any]) -> None:
    """Fewer seeds, fewer labels, other settings; no search where `quick` has none."""
    tree["search"] = less.get("search")
    tree["seeds"] = less.get("seeds", 1)
    tree["settings"] = [*tree.get("settings", []), *less.get("settings", [])]
    for axis, labels in less.get("axes", {}).items():
        tree["axes"][axis] = {str(label): tree["axes"][axis][str(label)] for label in labels}


def _build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass, or what a field of one holds, of plain YAML values. ConfigError says where."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _build(inner[0], value, where)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) - set(hints):
            unknown = sorted(set(value) - set(hints)) if isinstance(value, dict) else value
            raise ConfigError(where, unknown, "is not known here", f"use {', '.join(hints)}")
        try:
            return cast(Any, kind)(
                **{k: _build(hints[k], v, f"{where}.{k}") for k, v in value.items()}
            )
        except TypeError as error:
            raise ConfigError(where, value, str(error).split(") ")[-1], "add it") from None
    try:
        if origin is tuple:
            if not isinstance(value, list):
                raise ValueError
            return tuple(_build(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if origin is dict:
            return {str(k): _build(inner[1], v, f"{where}.{k}") for k, v in value.items()}
        if kind is str and isinstance(value, dict | list):
            raise ValueError
        return kind(value)
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError):
        named = getattr(kind, "__name__", str(kind)) if origin is None else origin.__name__
        raise ConfigError(where, value, f"is no {named}", "see cluster/study/spec.py") from None


SCORES = ("last", "mean")
KINDS = ("curves", "heat", "bars")
TESTS = ("greater", "similar", "rising", "falling")
TAKES = ("final", "mean", "best", "steps_to", "seconds_to", "queries_to")


def _check(study: Study) -> None:
    """ConfigError for what cannot be run, drawn or decided."""
    search = study.search or Search()
    if study.seeds < 1 or search.rungs < 1 or not search.rates:
        raise ConfigError("seeds", study.seeds, "must be at least 1", "set seeds=5")
    if not study.cells:
        raise ConfigError("axes", study.name, "no cell is left", "skip fewer")
    for key, name, known in _names(study, search):
        if name not in known:
            raise ConfigError(key, name, "is not known here", f"use {', '.join(known)}")


def _names(study: Study, search: Search) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Where a name is used, the name, and those that it may be."""
    axes = study.axes
    yield from (("search.per", axis, axes) for axis in search.per)
    yield "search.score", search.score, SCORES
    for figure in study.figures:
        yield "figures.kind", figure.kind, KINDS
        yield "figures.take", figure.take, TAKES
        yield "figures.lines", figure.lines, axes
        yield "figures.panels", figure.panels, [*axes, ""]
        if figure.kind == "heat":
            yield "figures.x", figure.x, axes
    for claim in study.claims:
        yield "claims.test", claim.test, TESTS
        yield "claims.take", claim.take, TAKES
        if claim.test in ("rising", "falling"):
            yield "claims.along", claim.along, axes
        else:
            yield "claims.more", next(iter(claim.more), ""), axes
            yield "claims.less", next(iter(claim.less), ""), axes
        yield "claims.each", claim.each, [*axes, ""]
    filters = [*study.skip, search.at, *(f.where for f in study.figures)]
    filters += [labels for c in study.claims for labels in (c.more, c.less, c.where)]
    for labels in filters:
        for axis, label in labels.items():
            yield "axes", axis, axes
            yield f"axes.{axis}", label, axes[axis]
