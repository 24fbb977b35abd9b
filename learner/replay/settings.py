"""What the queue's process needs of a configuration."""

from dataclasses import dataclass
from pathlib import Path

from configs.objectives import TABLE
from configs.schema import Config
from learner.replay.line import Rules
from learner.replay.staleness import Plan, plan


@dataclass(frozen=True)
class Settings:
    """What the service needs of a configuration. journal: its folder; None: keeps none."""

    plan: Plan
    ranks: int
    rules: Rules
    stall_seconds: float
    journal: str | None
    faults: tuple[str, str] = ("", "")


def rules(config: Config) -> Rules:
    """What a configuration says about failures."""
    limits = config.limits
    return Rules(
        TABLE[config.objective.name].min_valid, limits.failure_rate, limits.failure_window,
        limits.prompt_attempts,
    )  # fmt: skip


def of(config: Config, journal: Path | None, fault_folder: Path) -> Settings:
    """The settings of a checked and resolved configuration."""
    return Settings(
        plan(config), config.learner.ranks, rules(config), config.limits.stall_seconds,
        None if journal is None else str(journal.resolve()),
        (config.cluster.faults, str(fault_folder.resolve())),
    )  # fmt: skip
