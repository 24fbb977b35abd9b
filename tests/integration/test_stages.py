"""The commands `sft` and `reward-model`, through Ray and DeepSpeed ranks."""

import json

import numpy as np
import pytest

from cluster.__main__ import main
from cluster.stage import run_stage
from configs.load import prepare
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
    named = [runs, "run.name=scorer"]
    command = ["reward-model", "bandit", *named, *own("reward_model", str(policy), pairs)]
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
    seen = []
    for ranks in (1, 2):
        more = [f"learner.ranks={ranks}", f"learner.zero_stage={zero_stage if ranks > 1 else 0}"]
        folder = tmp_path / f"ranks-{ranks}"
        summary = run_stage(prepare("bandit", [*settings, *more]), kind, folder)
        assert summary["status"] == "finished", summary["failure"]
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        seen.append([v for line in lines for k, v in line.items() if "loss" in k])
    assert len(seen[0]) == 3 + 2
    assert np.allclose(seen[0], seen[1], atol=1e-5)
