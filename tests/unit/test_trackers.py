"""Trackers: TensorBoard reads, by its own code, what metrics.jsonl says."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import trackers
from cluster.metrics import MetricsFile
from configs.errors import ConfigError
from tests.harness import settings


def line(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "age": {"mean": 1.5, "max": 3, "histogram": {"0": 5}},
        "retired_total": {"exhausted": 10 * step}, "cells": [{"age": 0, "reuse": 1}],
    }  # fmt: skip


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics_lines_and_forgets_undone_steps(tmp_path):
    pytest.importorskip("tensorboard")
    config = settings("bandit", "run.trackers=tensorboard")
    trackers.check(config)
    file = MetricsFile(tmp_path / "metrics.jsonl", trackers.begin(config, tmp_path))
    for step in range(1, 6):
        file.add(line(step, 1 / step), evaluated=step == 3)
        if step == 2:
            end = file.end_of(2)
    file.complete(3, {"reward_eval": 0.25})
    assert end is not None
    file.cut(2, end)  # back to a checkpoint
    for step in (3, 4):
        file.add(line(step, -1.0), evaluated=False)
    file.close()
    shown = read(tmp_path / "tensorboard")
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert shown["loss"] == [(one["step"], np.float32(one["loss"])) for one in lines]
    assert shown["age.max"] == [(step, 3.0) for step in (1, 2, 3, 4)]
    assert shown["retired_total.exhausted"][-1] == (4, 40.0)
    assert set(shown) - {"reward_eval"} == {
        "loss", "age.mean", "age.max", "retired_total.exhausted"
    }  # fmt: skip
    assert shown.get("reward_eval", []) == []  # its step was undone


def test_a_tracker_that_is_not_installed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        trackers.check(settings("bandit", "run.trackers=tensorboard"))
    assert refused.value.key == "run.trackers" and "\n" not in str(refused.value)
    assert "pip install tensorboard" in str(refused.value)


def test_without_trackers_nothing_is_imported_and_nothing_written(tmp_path):
    config = settings("bandit")
    trackers.check(config)
    assert trackers.begin(config, tmp_path) == [] and list(tmp_path.iterdir()) == []
