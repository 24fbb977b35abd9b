"""Runs by name, and what the page shows of each: numbers, tables and thinned curves."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from cluster import wording
from cluster.dashboard import charts
from cluster.dashboard.history import History
from cluster.report import data as report_data
from cluster.report import headline as report_headline
from cluster.report import tables as report_tables
from cluster.thinning import thin

AT_A_TIME = 2.0  # seconds of reading, until the page is given what there is by then
KEPT = 16  # runs whose history stays in memory


class Run:
    """One run directory, followed."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.history = History(directory / "metrics.jsonl")
        self._lock = threading.Lock()

    def payload(self, have: str = "") -> dict[str, Any] | None:
        """All that the page shows of the run, its size bounded; None where it is still `have`."""
        with self._lock:
            tallied = not self._changed("summary.json")
            read = self.history.refresh(tallied, AT_A_TIME)
            tag = f"{self._tag()}-{read:d}"
            return None if tag == have else self._content() | {"tag": tag, "read": read}

    def _tag(self) -> str:
        files = ("config.yaml", "summary.json")
        return "-".join(map(str, (*self.history.state, *map(self._changed, files))))

    def _changed(self, name: str) -> int:
        try:
            return (self.directory / name).stat().st_mtime_ns
        except OSError:
            return 0

    def _content(self) -> dict[str, Any]:
        run = report_data.describe(self.directory)
        if not run.complete and self.history.tally:
            run.summary = self.history.tally.summary()
        if self.history.unreadable:
            run.notes.append(f"{self.history.unreadable} unreadable lines of metrics.jsonl")
        ledger = wording.part(run.summary, "ledger")
        return {
            "name": self.name,
            "complete": run.complete,
            "written": self._changed("metrics.jsonl") / 1e9 or None,
            "lines": self.history.lines,
            "subtitle": report_headline.subtitle(run),
            "tiles": report_headline.tiles(run),
            "rates": report_headline.rates(run.summary) if run.complete else [],
            "sentence": wording.how_on_policy(run.summary),
            "ledger": wording.ledger_line(ledger) if ledger else "",
            "balanced": wording.balanced(ledger),
            "notes": run.notes,
            "grids": _grids(run.summary.get("cells") or []),
            "curves": self._curves(),
        }

    def _curves(self) -> dict[str, Any]:
        out = {}
        for name in charts.shown(self.history.names()):
            steps, values = self.history.curve(name)
            x, y = thin(steps, values)
            out[name] = {"x": x.astype(int).tolist(), "y": y.tolist(), "of": len(steps)}
        return out


def _grids(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "title": grid.measure.title,
            "unit": grid.measure.unit,
            "columns": grid.columns,
            "rows": [
                [label, [cell and {"text": cell.text, "heat": cell.heat} for cell in row]]
                for label, row in grid.rows
            ],
        }
        for grid in report_tables.grids(cells)
    ]


class Catalogue:
    """The runs that may be looked at: those given, or else whatever is in `root` by then.

    A name from outside is only ever looked up here; no path is made of it.
    """

    def __init__(self, given: list[Path], root: Path) -> None:
        self._given = bool(given)
        self._named = _named(given)
        self._root = root
        self._open: dict[Path, Run] = {}
        self._lock = threading.Lock()

    def directories(self) -> dict[str, Path]:
        """Name → directory, as they are now; in a folder of the root: `folder/name`."""
        if not self._given:
            inside = [*_folders(self._root)]
            inside += [path for folder in inside if not is_run(folder) for path in _folders(folder)]
            self._named = {str(p.relative_to(self._root)): p for p in inside if is_run(p)}
        return self._named

    def listing(self) -> list[dict[str, Any]]:
        """A line a run, the one written to last first."""
        lines = [_line(name, path) for name, path in self.directories().items()]
        return sorted(lines, key=lambda line: -(line["written"] or 0))

    def run(self, name: str) -> Run | None:
        """The run of that name; None where there is none."""
        directory = self._named.get(name) or self.directories().get(name)
        if directory is None:
            return None
        with self._lock:
            run = self._open.pop(directory, None) or Run(name, directory)
            self._open[directory] = run  # the last one asked for stands last
            while len(self._open) > KEPT:
                del self._open[next(iter(self._open))]
        return run


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:
        return []


def is_run(directory: Path) -> bool:
    """Whether a directory has any of the files that a run writes."""
    return any((directory / name).is_file() for name in report_data.FILES)


def find(names: list[str], root: Path) -> list[Path]:
    """Run directories from what was typed: paths, or names in `root`.

    Raises FileNotFoundError with one line where there is no such run.
    """
    found = []
    for name in names:
        path = next((p for p in (Path(name), root / name) if is_run(p)), None)
        if path is None:
            raise FileNotFoundError(f"no run at {name}, nor at {root / name}")
        found.append(path.resolve())
    return list(dict.fromkeys(found))


def _named(paths: list[Path]) -> dict[str, Path]:
    """Each path by its last part, or by more of it where that is another's too."""
    lasts = [path.name for path in paths]
    return {path.name if lasts.count(path.name) == 1 else str(path): path for path in paths}


def _line(name: str, directory: Path) -> dict[str, Any]:
    """What the list says of a run, from its small files alone."""
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    summary = summary if isinstance(summary, dict) else {}
    try:
        written = (directory / "metrics.jsonl").stat().st_mtime
    except OSError:
        written = None
    status = summary.get("status") or ("going" if written and fresh(written) else "no summary")
    return {"name": name, "status": str(status), "written": written}


def fresh(written: float) -> bool:
    """Whether a run wrote within the last minute (epoch seconds)."""
    return time.time() - written < 60
