"""report.html: a run on one page that needs nothing else, from the files of its directory."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster import wording
from cluster.report import data as report_data
from cluster.report import headline as report_headline
from cluster.report import tables as report_tables
from cluster.report.plots import plots

TEMPLATE = "report.html.j2"


def write(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, and return its path.

    The run may be going on, or have been killed: what is missing is said on the page.
    Raises FileNotFoundError if the directory is not a run's.
    """
    run_dir = Path(run_dir)
    page = render(report_data.read(run_dir))
    path, draft = run_dir / "report.html", run_dir / ".report.html.part"
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
    return path


def render(run: report_data.Run) -> str:
    """The page's HTML. All text of the run is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=wording.number, percent=wording.percent)
    ledger = wording.part(run.summary, "ledger")
    return environment.get_template(TEMPLATE).render(
        run=run,
        subtitle=report_headline.subtitle(run),
        tiles=report_headline.tiles(run),
        sentence=wording.how_on_policy(run.summary),
        plots=plots(run),
        grids=report_tables.grids(run.summary.get("cells") or []),
        ledger=ledger,
        ledger_line=wording.ledger_line(ledger),
        balanced=wording.balanced(ledger),
        rates=report_headline.rates(run.summary),
        samples=[report_tables.readable(sample) for sample in run.samples],
        environment=report_tables.flatten(run.environment | _scorers(run.summary)),
    )


def _scorers(summary: dict[str, Any]) -> dict[str, Any]:
    """Identities of the reward and of the gold reward."""
    known = {name: wording.part(summary, name).get("identity") for name in ("reward", "gold")}
    return {name: identity for name, identity in known.items() if identity}
