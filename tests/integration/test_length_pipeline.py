"""A length problem from nothing to an evaluated policy, small, through the real parts."""

import json
from pathlib import Path

from cluster.__main__ import main
from cluster.stages.pipeline import pipeline

SMALL = [
    "length_data.sft=300", "length_data.prompts=40", "length_data.pairs=200", "sft.epochs=1",
    "rollout.max_tokens=16", "prompts.max_tokens=32", "learner.updates=3", "eval.every=0",
    "eval.samples=16", "replay.samples_per_round=16", "learner.minibatch=16",
]  # fmt: skip


def test_a_pipeline_ends_with_an_evaluated_policy_and_a_second_call_does_nothing_twice(tmp_path):
    settings = [*SMALL, f"run.dir={tmp_path}"]
    done = pipeline("length_min", settings)
    assert done["train"]["status"] == "finished"
    evaluation = done["evaluate"]
    assert evaluation["reward"] == "length(target=0, scale=20, end_tokens=[0])"
    assert 0 <= evaluation["length"] <= 16
    reward = json.loads((tmp_path / "length/reward_min/summary.json").read_text())
    assert reward["status"] == "finished"
    written = _times(tmp_path)
    again = pipeline("length_min", settings)
    assert again["train"] == json.loads(json.dumps(done["train"]))
    assert again["evaluate"] == evaluation
    assert {path for path, time in _times(tmp_path).items() if written.get(path) != time} == {
        Path("length_min/evaluation.json")
    }
    whole = [*settings, "rollout.max_tokens=64"]  # room for the preferences' responses
    assert main(["advise", "length_min", "samples=256", *whole]) == 0
    advised = json.loads((tmp_path / "advice/length_min/advice.json").read_text())
    assert advised["problem"].endswith("s") and "length(target=0" in advised["problem"]  # the gold
    assert advised["c2"]["responses"] == 256, "the reward model's preferences are the data"
    assert "pipeline length_min" in advised["advice"]["command"]


def _times(folder: Path) -> dict[Path, int]:
    """When each output was written."""
    names = ("summary.json", "model.safetensors", "*.jsonl", "evaluation.json")
    return {p.relative_to(folder): p.stat().st_mtime_ns for n in names for p in folder.rglob(n)}
