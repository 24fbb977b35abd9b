"""What a stage writes down: a metrics line per step, and what its summary says of them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.stages.base import Stage
from learner.stages.plan import StageStep, steps_per_epoch

SHOWN = ("loss", "held_out_loss", "held_out_accuracy")


class StageRecord:
    """metrics.jsonl of a stage; its lines are kept, so that a summary and a resume can read them.

    A line has `step`, steps taken or skipped; line 0 only what was measured before the first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Keep what is of steps up to this one; those after it are undone."""
        try:
            texts = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            texts = []
        lines = [line for text in texts if (line := _read(text)) is not None]
        self.lines = [line for line in lines if line["step"] <= step]
        whole = "".join(json.dumps(line) + "\n" for line in self.lines)
        self._path.write_text(whole, encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, Any]:
        """First and last loss, the held-out figures before training (`…_first`) and after, and the
        steps that were skipped with the reason of each."""
        first, last = self._ends("loss")
        out: dict[str, Any] = {"loss_first": first, "loss_last": last}
        held_out = {name for line in self.lines for name in line if name.startswith("held_out_")}
        for name in sorted(held_out):
            out[f"{name}_first"], out[name] = self._ends(name)
        skipped = {str(line["step"]): line["skipped"] for line in self.lines if "skipped" in line}
        return out | {"skipped": skipped}

    def _ends(self, name: str) -> tuple[float | None, float | None]:
        """The first and the last value of a metric; None where it has none."""
        values = [line[name] for line in self.lines if line.get(name) is not None]
        return (values[0], values[-1]) if values else (None, None)


def merge(ranks: Sequence[StageStep], stage: Stage, skipped_before: int) -> dict[str, Any]:
    """A step's metrics line from its ranks' records."""
    first = ranks[0]
    loss = sum(record.loss for record in ranks)
    seconds = max(record.seconds for record in ranks)
    line: dict[str, Any] = {
        "step": first.step,
        "epoch": (first.step - 1) // steps_per_epoch(stage),
        "lr": first.rate,
        "examples": first.examples,
        stage.unit: first.weight,
        "seconds": seconds,
    }
    if first.stepped:
        return {**line, "loss": loss, "skipped_total": skipped_before}
    what = "gradient" if math.isfinite(loss) else "loss"
    return {**line, "skipped": f"its {what} is not finite", "skipped_total": skipped_before + 1}


def data_summary(stage: Stage) -> dict[str, Any]:
    """What a stage learned from: rows read, rows dropped by reason, examples; the tokens that the
    examples of an epoch have, prompts included; the model that it began with."""
    return {
        "rows": stage.rows,
        "dropped": stage.dropped,
        "examples": len(stage.train_k),
        "held_out_examples": len(stage.held_out_k),
        "tokens": int(stage.length_n[stage.train_k].sum()),
        "base": stage.source.path,
    }


def _read(text: str) -> dict[str, Any] | None:
    """A line, unless it was cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
