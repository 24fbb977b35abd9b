"""Folders of runs for the live page, with metrics made by hand; a token; a name that attacks."""

import json
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-length"
NASTY = "<img src=x onerror=alert(1)>"


def line(step: int) -> dict[str, Any]:
    """A metrics line of a pipelined run, with as many numbers as a real one has."""
    ages = (step % 4, step % 4 + 4)
    cell = {"rollouts": 50, "gradient_share": 0.5, "kl_to_generator": 0.01 * step, "ess": 0.9}
    return {
        "step": step, "batch": step - 1, "loss": 1 / step, "reward_mean": 0.1 * step,
        "age": {"mean": 1.5, "max": ages[1], "histogram": {str(age): 50 for age in ages}},
        "reuse": {"mean": 1.0, "max": 1, "histogram": {"1": 100}},
        "kl_to_generator": 0.1 / step, "queue_depth": 100, "rollouts_in_flight": 0,
        "retired_total": {"exhausted": 100 * step, "lost": 0},
        "cells": [{"age": age, "reuse": 1, **cell} for age in ages],
    }  # fmt: skip


def write(path: Path, lines: list[dict[str, Any]], name: str = "run") -> Path:
    directory = path / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return directory
