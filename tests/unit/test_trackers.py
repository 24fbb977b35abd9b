"""Trackers: TensorBoard, Trackio and Weights & Biases have what metrics.jsonl says."""

import contextlib
import importlib.util
import json
import sqlite3
import struct
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


def logged(folder: Path) -> tuple[list[dict[str, float]], set[str]]:
    """The history of a W&B run's file, a LevelDB log of protocol buffers, and its ids."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place = path.read_bytes(), 7
        while place < len(data):
            if 32_768 - place % 32_768 < 7:  # the rest of a block is empty
                place += 32_768 - place % 32_768
            size, kind = struct.unpack_from("<HB", data, place + 4)
            assert kind == 1, "a record in several parts"
            record = Record.FromString(data[place + 7 : place + 7 + size])
            place += 7 + size
            ids |= {record.run.run_id} - {""}
            if record.HasField("history"):
                items = record.history.item
                line = {one.key or ".".join(one.nested_key): one.value_json for one in items}
                history.append({key: json.loads(text) for key, text in line.items()})
    return history, ids


def test_weights_and_biases_has_the_metrics_lines_in_one_run_and_sends_nothing(
    tmp_path, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = settings("bandit", "run.trackers=wandb")
    for steps in ((1, 2, 3), (4, 5)):  # stopped, and gone on with
        file = MetricsFile(tmp_path / "metrics.jsonl", trackers.begin(config, tmp_path))
        for step in steps:
            file.add(line(step, 1 / step), evaluated=False)
        file.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    history, ids = logged(tmp_path / "wandb")
    assert [(one["step"], one["loss"]) for one in history] == [
        (one["step"], one["loss"]) for one in lines
    ]
    assert [one["retired_total.exhausted"] for one in history] == [10, 20, 30, 40, 50]
    assert [one["age.mean"] for one in history] == [1.5] * 5 and len(ids) == 1


def test_trackio_has_the_metrics_lines_in_one_run_of_its_own_folder(tmp_path, monkeypatch, capsys):
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when trackio is imported
    pytest.importorskip("trackio")
    one, another = tmp_path / "one", tmp_path / "elsewhere" / "one"
    config = settings("bandit", "run.trackers=trackio")
    trackers.check(config)
    # Stopped, another of that name begun, and the first gone on with.
    for run, steps in ((one, (1, 2, 3)), (another, (1, 2)), (one, (4, 5))):
        run.mkdir(parents=True, exist_ok=True)
        file = MetricsFile(run / "metrics.jsonl", trackers.begin(config, run))
        for step in steps:
            file.add(line(step, 1 / step), evaluated=False)
        file.close()
    assert capsys.readouterr().out == ""

    runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "onpolicy.db")) as store:
        rows = store.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id")
        for run_id, name, step, metrics in rows:
            assert name.startswith("one ")
            runs.setdefault(run_id, []).append((step, json.loads(metrics)))
    assert [[step for step, _ in one] for one in runs.values()] == [[1, 2, 3, 4, 5], [1, 2]]
    for step, logged_line in next(iter(runs.values())):
        expected = {"loss": 1 / step, "age.mean": 1.5, "age.max": 3}
        assert logged_line == {**expected, "retired_total.exhausted": 10 * step}


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
