"""claims.json and page.html of a study: what was decided, on one page that needs nothing else."""

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.study.claims import FAILS, HOLDS, UNDECIDED
from cluster.study.spec import Study
from cluster.study.take import rows_of
from cluster.wording import ABSENT, number
from configs.errors import one_line

TEMPLATE = "study.html.j2"
MARKS = {HOLDS: "good", FAILS: "bad", UNDECIDED: "soft"}  # class of a verdict in CSS


def write(
    claims: list[dict[str, Any]], folder: Path, study: Study, frame: pd.DataFrame, command: str
) -> Path:
    """Write claims.json and page.html into a study's folder; return the page's path.

    The page has the folder's figure.png in it where there is one. command: what made the study.
    """
    text = json.dumps(claims, ensure_ascii=False, indent=2, allow_nan=False)
    _put(folder / "claims.json", text + "\n")
    figure = folder / "figure.png"
    image = base64.b64encode(figure.read_bytes()).decode() if figure.is_file() else ""
    page = folder / "page.html"
    _put(page, render(claims, study, frame, command, image))
    return page


def render(
    claims: list[dict[str, Any]], study: Study, frame: pd.DataFrame, command: str, image: str = ""
) -> str:
    """The page's HTML. All text of the study is escaped. image: a PNG in base 64."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, interval=_interval, counts=_counts)
    return environment.get_template(TEMPLATE).render(
        study=study,
        claims=claims,
        marks=MARKS,
        tally=", ".join(
            f"{sum(claim['verdict'] == verdict for claim in claims)} {said}"
            for verdict, said in ((HOLDS, "hold"), (FAILS, "do not hold"), (UNDECIDED, "undecided"))
        ),
        cells=_cells(study, frame),
        failed=_failed(study, frame),
        command=command,
        image=image,
    )


def _cells(study: Study, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Each cell's labels, learning rate, and how many trials finished and failed."""
    trials = frame.drop_duplicates("trial")
    found = []
    for cell in study.cells:
        rows = rows_of(trials, cell)
        rates = sorted(rows["rate"].dropna().unique()) if "rate" in rows else []
        found.append(
            {
                "labels": list(cell.values()),
                "rate": ", ".join(f"{rate:.3g}" for rate in rates) or ABSENT,
                "finished": int((rows["status"] == "finished").sum()),
                "failed": int((rows["status"] == "failed").sum()),
            }
        )
    return found


def _failed(study: Study, frame: pd.DataFrame) -> list[str]:
    """The failed trials by name, each with its cell, seed and, where the frame has it, why."""
    rows = frame[frame["status"] == "failed"].drop_duplicates("trial")
    return [
        f"{row['trial']} ({', '.join(f'{axis} {row[axis]}' for axis in study.axes)}, "
        f"seed {row['seed']}{', ' + one_line(str(row['failure'])) if row.get('failure') else ''})"
        for row in rows.to_dict("records")
    ]


def _interval(ends: list[float] | None) -> str:
    return ABSENT if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def _counts(n: dict[str, int]) -> str:
    """Trials of each arm; once where all have as many."""
    different = set(n.values())
    return f"{different.pop()} each" if len(different) == 1 else ", ".join(map(str, n.values()))


def _put(path: Path, text: str) -> None:
    """Write whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
