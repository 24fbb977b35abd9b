"""What every bench does with its numbers: a ratio with its spread as a line, and a JSON file."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path("runs/bench")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, quartiles where there are four values or more, and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    inner = ""
    if len(values) >= 4:
        first, _, third = statistics.quantiles(values, n=4)
        inner = f"quartiles {first:.{digits}f} to {third:.{digits}f}, "
    return f"{middle:.{digits}f} ({inner}all from {low:.{digits}f} to {high:.{digits}f})"


def ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Turn by turn, ours over the other's."""
    return [one / other for one, other in zip(ours, others, strict=True)]


def write(name: str, results: Any) -> Path:
    """Keep results as `runs/bench/NAME.json`; returns where."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"{name}.json"
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return target
