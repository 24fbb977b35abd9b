"""Whole runs through the real parts: Ray actors, Ray Serve, the queue, DeepSpeed ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.preferences import from_rollouts, write_parquet
from cluster.crew import Crew
from cluster.train import train
from configs.load import prepare
from tests.harness import Local, balanced, settings

STEPS = ["inputs", "ray", "asked", "rewards", "learner", "actors", "first_update"]  # of a start


def run(
    folder: Path, preset: str, *overrides: str, crew: Crew | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's summary and metrics lines. crew: where it need not be of processes of its own."""
    config = prepare(preset, [f"run.dir={folder}", "eval.every=0", "eval.samples=20", *overrides])
    summary = train(config, preset, crew)
    assert summary["status"] == "finished", summary["failure"]
    lines = (folder / summary["name"] / "metrics.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


def test_the_bandit_learns_and_writes_what_a_run_writes(ray_cluster, tmp_path):
    gold = ["gold.kind=peak", "gold.centre=20"]  # where π_ref is, and the reward leads away from
    summary, lines = run(tmp_path, "bandit", "learner.updates=60", "eval.every=20", *gold)
    assert summary["reward_initial"] < 0.08 and summary["reward_eval"] > 0.4
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["step"] for line in lines if "reward_eval" in line] == [20, 40, 60]
    assert [line["step"] for line in lines if "reward_gold" in line] == [20, 40, 60]
    assert summary["reward_gold"] < summary["reward_gold_initial"] - 0.1
    assert summary["age"]["histogram"] == {str(age): 600 for age in range(10)}
    assert summary["reuse"]["histogram"] == {str(reuse): 600 for reuse in range(1, 11)}
    assert summary["ledger"]["retired"]["exhausted"] == summary["ledger"]["issued"] == 600
    assert balanced(summary["ledger"]) and summary["updates"] == 60
    steps = summary["startup"]["seconds"]
    assert list(steps) == STEPS and list(steps.values()) == sorted(steps.values())
    names = {
        "age",
        "reuse",
        "kl_to_generator",
        "kl_from_generator",
        "kl_to_reference",
        "ess",
        "loss",
    }
    assert all(names <= set(line) for line in lines)
    assert "clip_fraction" not in lines[0]  # PPO's; absent elsewhere, never 0
    directory = tmp_path / summary["name"]
    samples = (directory / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 6 * 3 and "response" in json.loads(samples[0])
    identity = "peak(centre=70, width=10)"
    assert {json.loads(sample)["scorer"] for sample in samples} == {identity}
    assert summary["reward"] == {"identity": identity}
    assert summary["gold"] == {"identity": "peak(centre=20, width=10)"}
    page = (directory / "report.html").read_text()
    assert "Proxy and gold reward" in page and identity in page
    for name in ("config.yaml", "environment.json", "summary.json", "report.html"):
        assert (directory / name).stat().st_size > 100
    assert (directory / "checkpoints/step-60/hf/model.safetensors").exists()


def test_lockstep_rounds_of_four_minibatches_twice_have_ages_0_to_7(crew, tmp_path):
    summary, _ = run(
        tmp_path, "bandit_best_of_n", "replay.samples_per_round=400", "learner.minibatch=100",
        "replay.inner_epochs=2", "learner.updates=16", "rollout.actors=2", crew=crew,
    )  # fmt: skip
    assert summary["age"]["histogram"] == {str(age): 200 for age in range(8)}
    assert summary["reuse"]["histogram"] == {"1": 800, "2": 800}
    assert summary["ledger"]["retired"]["exhausted"] == 800
    assert summary["ledger"]["retired"]["expired"] == 0 and balanced(summary["ledger"])


@pytest.mark.parametrize("max_age", [4])  # 0, 1 and 16 too: test_queue.py, and docs/runs.md
def test_pipelined_no_sample_over_the_budget_reaches_a_gradient(crew, tmp_path, max_age):
    summary, lines = run(
        tmp_path, "bandit_pipelined", f"replay.max_age={max_age}", "rollout.actors=2",
        "learner.updates=30", crew=crew,
    )  # fmt: skip
    assert max(line["age"]["max"] for line in lines) == summary["age"]["max"] <= max_age
    assert summary["ledger"]["retired"]["expired"] == 0 and balanced(summary["ledger"])
    assert summary["reuse"]["histogram"] == {"1": 3000}
    probed = [nats for line in lines if (nats := line.get("engine_mismatch_probe")) is not None]
    assert len(probed) >= 5 and summary["engine_mismatch_probe"] == max(probed) <= 1e-9
    assert summary["engine_mismatch_alarms"] == 0


def test_lag_sets_the_age_at_first_use(crew, tmp_path):
    _, lines = run(
        tmp_path, "bandit_best_of_n", "replay.lag=3", "replay.inner_epochs=1",
        "learner.updates=12", crew=crew,
    )  # fmt: skip
    ages = [line["age"]["histogram"] for line in lines]
    assert ages == [{str(min(step, 3)): 100} for step in range(12)]


def test_runs_with_equal_seeds_are_bit_equal_whatever_the_number_of_actors(crew, tmp_path):
    overrides = ["learner.updates=20", "rollout.lease=5"]
    one = run(tmp_path, "bandit_ppo", *overrides, crew=crew)[1]
    two = run(tmp_path, "bandit_ppo", "rollout.actors=2", *overrides, crew=crew)[1]
    for name in ("loss", "reward_mean", "kl_to_generator", "kl_to_reference"):
        assert [line[name] for line in one] == [line[name] for line in two]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> str:
    """A preference file of 20 groups, sampled from π_ref and scored."""
    local = Local(settings("bandit", "replay.samples_per_round=200", "learner.minibatch=200"))
    local.generate()
    path = str(tmp_path_factory.mktemp("data") / "recorded.parquet")
    write_parquet(path, from_rollouts(local.queue.get(0, 0, 0).block))
    return path


def test_two_ranks_and_one_give_the_same_losses_on_recorded_batches(crew, tmp_path, recorded):
    overrides = [f"data.path={recorded}", "learner.updates=10"]
    one = run(tmp_path, "offline_ipo", *overrides, crew=crew)[1]
    assert one[-1]["loss"] < one[0]["loss"]
    for zero_stage in (0, 2):
        ranks = ["learner.ranks=2", f"learner.zero_stage={zero_stage}"]
        two = run(tmp_path, "offline_ipo", *ranks, *overrides, crew=crew)[1]
        assert np.allclose([x["loss"] for x in one], [x["loss"] for x in two], rtol=2e-4)


def test_offline_data_sampled_from_the_reference_goes_through_the_same_queue(crew, tmp_path):
    summary, lines = run(
        tmp_path, "offline_binary_feedme", "data.prompts=20", "learner.updates=20", crew=crew
    )
    assert summary["age"]["histogram"] == {} and "age" not in lines[0]
    assert summary["reuse"]["max"] == 10 and balanced(summary["ledger"])
    assert (tmp_path / summary["name"] / "offline.parquet").exists()


def test_a_lease_whose_actor_died_is_issued_again(ray_cluster, tmp_path, monkeypatch):
    from cluster.fleet import Fleet

    watch, killed = Fleet.watch, []

    def kill_once_then_watch(fleet: Fleet, unheard: dict[int, float]) -> list[str]:
        if not killed and fleet.running:
            killed.append(True)
            ray.kill(fleet.workers[0])
        return watch(fleet, unheard)

    monkeypatch.setattr(Fleet, "watch", kill_once_then_watch)
    summary, lines = run(tmp_path, "bandit_ppo", "rollout.lease=2", "learner.updates=40")
    assert killed and len(lines) == 40
    assert summary["ledger"]["retired"]["exhausted"] == summary["ledger"]["issued"] == 400


def test_actors_and_evaluator_that_get_an_adapter_alone_have_the_learners_weights(crew, tmp_path):
    summary, lines = run(
        tmp_path, "bandit_ppo", "learner.lora.rank=8", "learner.lr=1e-2", "learner.updates=40",
        "rollout.adapter_only=true", "replay.schedule=pipelined", "replay.inner_epochs=4",
        "eval.every=20", crew=crew,
    )  # fmt: skip
    assert summary["reward_eval"] > 0.15 > 2 * summary["reward_initial"]
    probed = [nats for line in lines if (nats := line.get("engine_mismatch_probe")) is not None]
    assert len(probed) >= 5 and max(probed) <= 1e-7
    assert summary["engine_mismatch_alarms"] == 0 and balanced(summary["ledger"])
    hf = tmp_path / summary["name"] / "checkpoints" / "step-40" / "hf"
    assert {f.suffix for f in hf.iterdir()} == {".json", ".safetensors"}
    assert evaluated(hf) > 0.15  # what it exports is what was evaluated


def evaluated(hf: Path) -> float:
    """Mean reward of fresh responses of a model directory."""
    config = settings("bandit_ppo", f"policy.path={hf}", "prompts.source=jsonl",
                      f"prompts.path={contexts(hf.parent)}", "rollout.max_tokens=10")  # fmt: skip
    local = Local(config)
    return float(next(local.steps(1)).index["reward_mean"])


def contexts(folder: Path) -> Path:
    """A file of the bandit's ten prompts."""
    path = folder / "contexts.jsonl"
    path.write_text("".join(json.dumps({"prompt_ids": [n]}) + "\n" for n in range(10)))
    return path
