"""The numbers at the head of a run's page, the same in the report and on the live page."""

from typing import Any

from cluster import wording
from cluster.report import data as report_data


def subtitle(run: report_data.Run) -> str:
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


def tiles(run: report_data.Run) -> list[tuple[str, str, str]]:
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


def _most(summary: dict[str, Any], name: str) -> str:
    most = wording.part(summary, name).get("max")
    return wording.ABSENT if most is None else f"≤ {wording.number(most)}"


def rates(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Throughput and idle shares."""
    throughput, idle = wording.part(summary, "throughput"), wording.part(summary, "idle")
    units = {"rollouts_per_s": "rollouts", "updates_per_s": "updates", "tokens_per_s": "tokens"}
    rows = [(f"{unit} per second", wording.number(throughput.get(k))) for k, unit in units.items()]
    rows += [(f"{who} idle", wording.percent(idle.get(who))) for who in ("actors", "learner")]
    return rows
