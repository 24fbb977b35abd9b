"""report.html: a run on one page that needs nothing else, from the files of its directory."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster import report_data, report_tables, wording
from cluster.report_plots import plots

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
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        sentence=wording.how_on_policy(run.summary),
        plots=plots(run),
        grids=report_tables.grids(run.summary.get("cells") or []),
        ledger=ledger,
        ledger_line=wording.ledger_line(ledger),
        balanced=wording.balanced(ledger),
        rates=_rates(run.summary),
        samples=[report_tables.readable(sample) for sample in run.samples],
        environment=report_tables.flatten(run.environment | _scorers(run.summary)),
    )


def _subtitle(run: report_data.Run) -> str:
    """Preset, objective, source and seed, as far as they are known."""
    of = run.summary
    objective = of.get("objective") or wording.part(run.config, "objective").get("name")
    said = [
        f"preset {of['preset']}" if of.get("preset") else "",
        str(objective or ""),
        str(wording.part(run.config, "data").get("source") or ""),
        f"seed {of.get('seed', run.config.get('seed', wording.ABSENT))}",
    ]
    return " · ".join(text for text in said if text)


def _tiles(run: report_data.Run) -> list[tuple[str, str, str]]:
    """The headline: (label, value, remark)."""
    of, number = run.summary, wording.number
    skipped = f"{number(of['skipped'])} skipped" if of.get("skipped") else ""
    return [
        (
            "status",
            str(of.get("status") or "no summary"),
            "" if run.complete else "going or killed",
        ),
        (
            "reward_eval",
            wording.change(of, "reward_initial", "reward_eval"),
            f"training mean {number(of.get('reward_mean'))}",
        ),
        *_gold(of),
        ("updates", number(of.get("updates")), skipped),
        ("wall time", wording.duration(of.get("wall_seconds")), ""),
        ("age", _most(of, "age"), wording.mean_max(of, "age")),
        ("reuse", _most(of, "reuse"), wording.mean_max(of, "reuse")),
        ("KL to generator", number(of.get("kl_to_generator")), "nats per token"),
        ("KL to reference", number(of.get("kl_to_reference")), "nats per token, at the end"),
        ("ESS", number(of.get("ess")), "fraction of samples"),
    ]


def _gold(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The gold reward's tile, where there is a gold reward."""
    if summary.get("reward_gold") is None:
        return []
    value = wording.change(summary, "reward_gold_initial", "reward_gold")
    return [("reward_gold", value, "of the same rollouts, not trained on")]


def _scorers(summary: dict[str, Any]) -> dict[str, Any]:
    """Identities of the reward and of the gold reward."""
    known = {name: wording.part(summary, name).get("identity") for name in ("reward", "gold")}
    return {name: identity for name, identity in known.items() if identity}


def _most(summary: dict[str, Any], name: str) -> str:
    most = wording.part(summary, name).get("max")
    return wording.ABSENT if most is None else f"≤ {wording.number(most)}"


def _rates(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Throughput and idle shares."""
    throughput, idle = wording.part(summary, "throughput"), wording.part(summary, "idle")
    units = {"rollouts_per_s": "rollouts", "updates_per_s": "updates", "tokens_per_s": "tokens"}
    rows = [(f"{unit} per second", wording.number(throughput.get(k))) for k, unit in units.items()]
    rows += [(f"{who} idle", wording.percent(idle.get(who))) for who in ("actors", "learner")]
    return rows
