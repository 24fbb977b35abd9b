"""A stage as a run, its one rank in this process instead of a Ray actor's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster.__main__ import main
from cluster.progress import Progress
from cluster.stages import stage as stages
from cluster.stages.stage import StageRun, run_stage
from configs.load import ConfigError, prepare
from configs.schema import Config
from learner.stages.worker import StageWorker
from tests.harness import free_port
from tests.stages import model_directory, preference_rows, sft_rows, write_rows


class Worker(StageWorker):
    """A rank whose address needs no Ray, and that can be told to die or to lose its losses."""

    die_after: int | None = None  # steps
    broken_from: int | None = None

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", free_port()

    def train(self, count: int) -> list[Any]:
        trained, first = self.trained, type(self).broken_from
        if type(self).die_after is not None and trained.position >= type(self).die_after:
            raise RuntimeError("the rank died")
        real = type(trained.stage).losses

        def losses(output_N: Any) -> Any:
            broken = first is not None and trained.position >= first
            return real(trained.stage, output_N) * (float("nan") if broken else 1.0)

        trained.stage.losses = losses  # type: ignore[method-assign]
        return super().train(count)


class LocalRun(StageRun):
    def _spawn(self) -> list[Any]:
        return [Worker(self.config, self.stage.kind, 0)]

    def _call(self, method: str, seconds: float, *arguments: Any) -> list[Any]:
        return [getattr(worker, method)(*arguments) for worker in self.workers]

    def _end(self) -> None:
        self.workers.clear()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    def run(config: Config, stage: Any, directory: Any) -> dict[str, Any]:
        with Progress(directory.name, 1) as progress:
            return LocalRun(config, stage, directory, progress).complete()

    monkeypatch.setattr(stages, "_run", run)
    monkeypatch.setattr(Worker, "die_after", None)
    monkeypatch.setattr(Worker, "broken_from", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Settings of both stages: 5 and 5 steps an epoch, two epochs."""
    folder = tmp_path_factory.mktemp("data")
    sft = write_rows(folder / "rows.jsonl", sft_rows(44))
    pairs = write_rows(folder / "pairs.jsonl", preference_rows(44))
    base = model_directory(folder / "base")
    both = [
        f"{kind}.{setting}" for kind in ("sft", "reward_model")
        for setting in (f"model={base}", "lr=1e-2", "minibatch=8", "epochs=2")
    ]  # fmt: skip
    return [*both, f"sft.path={sft}", f"reward_model.path={pairs}", "checkpoint.every=3"]


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "hf" / "model.safetensors")


@pytest.mark.parametrize("kind", ["sft", "reward_model"])
def test_a_stage_writes_its_directory_and_is_done_once(kind, data, tmp_path):
    config = prepare("bandit", [*data, f"{kind}.eval_every=4"])
    summary = run_stage(config, kind, tmp_path / "one")
    assert summary["status"] == "finished" and summary["steps"] == 10 and not summary["skipped"]
    assert summary["rows"] == 44 and summary["examples"] + summary["held_out_examples"] == 44
    assert summary["model"] == str(tmp_path / "one" / "hf") and summary["seconds"] > 0
    written = lines(tmp_path / "one")
    assert [line["step"] for line in written] == list(range(11))
    assert [line["step"] for line in written if "held_out_loss" in line] == [0, 4, 8, 10]
    assert summary["held_out_loss"] == written[-1]["held_out_loss"]
    assert summary["held_out_loss"] < summary["held_out_loss_first"] == written[0]["held_out_loss"]
    assert (summary["loss_first"], summary["loss_last"]) == (
        written[1]["loss"],
        written[10]["loss"],
    )
    for name in ("config.yaml", "environment.json", "hf/config.json", "hf/tokenizer.json"):
        assert (tmp_path / "one" / name).exists()
    before = (tmp_path / "one" / "metrics.jsonl").stat().st_mtime_ns
    assert run_stage(config, kind, tmp_path / "one") == summary
    assert (tmp_path / "one" / "metrics.jsonl").stat().st_mtime_ns == before


def test_held_out_accuracy_and_calibration_are_in_the_summary(data, tmp_path):
    summary = run_stage(prepare("bandit", data), "reward_model", tmp_path / "one")
    names = ("accuracy", "calibration_error", "brier", "loss")
    assert {f"held_out_{name}" for name in names} <= set(summary)
    assert summary["held_out_accuracy"] >= 0.9 and summary["held_out_brier"] < 0.25


@pytest.mark.parametrize("kind", ["sft", "reward_model"])
def test_an_interrupted_stage_goes_on_to_the_same_weights(kind, data, tmp_path, monkeypatch):
    """The rank dies at step 7; the checkpoint is of step 6."""
    config = prepare("bandit", data)
    whole = run_stage(config, kind, tmp_path / "whole")
    monkeypatch.setattr(Worker, "die_after", 6)
    cut = run_stage(config, kind, tmp_path / "cut")
    assert cut["status"] == "failed" and cut["failure"] == "RuntimeError: the rank died"
    assert cut["steps"] == 6 and cut["model"] is None and not (tmp_path / "cut" / "hf").exists()
    monkeypatch.setattr(Worker, "die_after", None)
    again = run_stage(config, kind, tmp_path / "cut")
    assert again["status"] == "finished" and again["resumed_at"] == 6
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / n)]
                for n in ("whole", "cut")]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert again["loss_first"] == whole["loss_first"]


def test_three_steps_in_a_row_that_are_not_finite_stop_it_with_the_last_checkpoint_intact(
    data, tmp_path, monkeypatch
):
    config = prepare("bandit", data)
    monkeypatch.setattr(Worker, "broken_from", 4)
    summary = run_stage(config, "sft", tmp_path / "one")
    assert summary["status"] == "failed" and summary["model"] is None
    assert summary["failure"].startswith("NotFinite: steps 5, 6, 7 in a row were skipped, its loss")
    assert "set sft.lr below 0.01" in summary["failure"]
    assert summary["skipped"] == {str(step): "its loss is not finite" for step in (5, 6, 7)}
    assert all("loss" not in line for line in lines(tmp_path / "one")[5:])
    assert [p.name for p in (tmp_path / "one" / "checkpoints").iterdir()] == ["batch-00000003"]
    monkeypatch.setattr(Worker, "broken_from", None)
    again = run_stage(config, "sft", tmp_path / "one")
    assert again["status"] == "finished" and again["resumed_at"] == 3 and not again["skipped"]


def test_one_skipped_step_is_counted_and_named_and_training_goes_on(data, tmp_path, monkeypatch):
    train = Worker.train

    def once(worker: Worker, count: int) -> list[Any]:
        type(worker).broken_from = 4 if worker.trained.position == 4 else None
        return train(worker, 1)

    monkeypatch.setattr(Worker, "train", once)
    summary = run_stage(prepare("bandit", data), "sft", tmp_path / "one")
    assert summary["status"] == "finished" and summary["steps"] == 10
    assert summary["skipped"] == {"5": "its loss is not finite"}
    assert [line["skipped_total"] for line in lines(tmp_path / "one")[1:]] == [0] * 4 + [1] * 6


def test_other_settings_are_refused_and_those_of_other_stages_are_free(data, tmp_path):
    run_stage(prepare("bandit", data), "sft", tmp_path / "one")
    free = prepare("bandit", [*data, "reward_model.lr=0.5", "learner.lr=0.5", "objective.name=dpo"])
    assert run_stage(free, "sft", tmp_path / "one")["status"] == "finished"
    with pytest.raises(ConfigError, match="finished with other settings: sft.epochs: 2 → 3"):
        run_stage(prepare("bandit", [*data, "sft.epochs=3"]), "sft", tmp_path / "one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("42")
    with pytest.raises(ConfigError, match="no run made"):
        run_stage(free, "sft", tmp_path / "mine")


def test_a_command_with_wrong_input_is_one_line_and_leaves_nothing(data, tmp_path, capsys):
    runs = tmp_path / "runs"
    for command, words in (
        (["sft", "bandit", *data, "sft.path=none.jsonl"], "none.jsonl"),
        (["reward-model", "bandit", *data, "reward_model.model=/none"], "reward_model.model=/none"),
        (["sft", "bandit"], "sft.model="),
    ):
        assert main([*command, f"run.dir={runs}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not runs.exists()
