"""The commands `sft` and `reward-model`, through Ray and DeepSpeed ranks."""

import json

import numpy as np
import pytest

from cluster.__main__ import main
from cluster.stages.stage import run_stage
from configs.load import prepare
from learner.engine import join
from learner.stages.supervised import Supervised
from tests.harness import free_port
from tests.stages import model_directory, preference_rows, sft_rows, write_rows

TINY = ["lr=1e-2", "minibatch=16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return model_directory(tmp_path_factory.mktemp("base"))


def own(kind: str, base: str, path: str, *settings: str) -> list[str]:
    return [f"{kind}.{text}" for text in (f"model={base}", f"path={path}", *TINY, *settings)]


def test_sft_then_a_reward_model_from_its_output(ray_cluster, base, tmp_path, capsys):
    """Each command writes its run directory, and the second begins with the first one's model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    runs = f"run.dir={tmp_path / 'runs'}"
    rows = write_rows(tmp_path / "rows.jsonl", sft_rows(100))
    assert main(["sft", "bandit", runs, *own("sft", base, rows, "epochs=2")]) == 0
    policy = tmp_path / "runs" / "bandit-sft-1" / "hf"
    assert f"model: {policy}" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(policy).config.eos_token_id == 0
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(100))
    settings = own("reward_model", str(policy), pairs, "epochs=2")
    command = ["reward-model", "bandit", runs, "run.name=scorer", *settings]
    assert main(command) == 0
    summary = json.loads((tmp_path / "runs" / "scorer" / "summary.json").read_text())
    assert summary["base"] == str(policy) and summary["held_out_accuracy"] >= 0.9
    scorer = AutoModelForSequenceClassification.from_pretrained(summary["model"])
    assert scorer.config.num_labels == 1
    assert main(command) == 2 and "scorer: is finished" in capsys.readouterr().err


@pytest.mark.parametrize("kind, zero_stage", [("sft", 0), ("reward_model", 2)])
def test_two_ranks_and_one_give_the_same_losses(ray_cluster, base, tmp_path, kind, zero_stage):
    rows = sft_rows(45) if kind == "sft" else preference_rows(45)
    settings = own(kind, base, write_rows(tmp_path / "rows.jsonl", rows), "micro_batch=3")
    join(0, 1, ("127.0.0.1", free_port()), 1)
    alone = Supervised(prepare("bandit", settings), kind, 0)
    before = held_out_loss(alone)
    one = [before, *(record.loss for record in alone.train(3)), held_out_loss(alone)]
    ranks = ["learner.ranks=2", f"learner.zero_stage={zero_stage}"]
    summary = run_stage(prepare("bandit", [*settings, *ranks]), kind, tmp_path / "two")
    assert summary["status"] == "finished", summary["failure"]
    lines = list(map(json.loads, (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()))
    losses = [line["loss"] for line in lines[1:]]
    two = [lines[0]["held_out_loss"], *losses, lines[-1]["held_out_loss"]]
    assert np.allclose(one, two, atol=1e-5) and len(losses) == 3


def held_out_loss(trained: Supervised) -> float:
    examples, outputs = trained.evaluate()
    return trained.stage.figures(outputs, trained.stage.weight_n[examples])["held_out_loss"]
