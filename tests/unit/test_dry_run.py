"""The dry run's arithmetic: parameters of published networks, ZeRO's shards, what does not fit."""

import pytest
import torch

from actors import policy
from cluster.__main__ import main
from cluster.doctor import dry_run, known_shapes
from cluster.doctor import machine as doctor_machine
from cluster.stages.pipeline import named
from configs.errors import ConfigError
from configs.load import prepare
from tests.harness import Local

PUBLISHED = {  # parameters, as counted in the public checkpoints
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
}
FULL_SCALE = {  # preset → GPUs at most
    "alpaca_farm": 8, "alpaca_farm_ppo": 8, "alpaca_farm_rwr": 8, "alpaca_farm_reinforce": 8,
    "alpaca_farm_best_of_n": 8, "alpaca_farm_offline_dpo": 8, "alpaca_farm_pref_ft": 8,
    "ultrafeedback": 16, "ultrafeedback_offline_dpo": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_network_has_its_published_number_of_parameters(name):
    assert dry_run.network(known_shapes.shape("policy.path", name)).parameters == PUBLISHED[name]


def test_the_kv_cache_of_grouped_queries_is_that_of_its_key_heads():
    mistral = dry_run.network(known_shapes.shape("policy.path", "mistralai/Mistral-7B-v0.1"))
    assert mistral.cached == 2 * 32 * 8 * 128


def test_zero_shards_the_optimizer_then_gradients_then_weights():
    parts = {}
    for stage in range(4):
        config = prepare("gpu_8", [f"learner.zero_stage={stage}"])
        parts[stage] = {r.name: r for r in dry_run.roles(config)}["learner rank"].parts
    whole = 1_414_647_808
    assert parts[0]["optimizer"] == 12 * whole and parts[0]["weights"] == 2 * whole
    assert [parts[s]["optimizer"] / whole for s in range(4)] == [12, 3, 3, 3]
    assert [parts[s]["gradients"] / whole for s in range(4)] == [2, 2, 0.5, 0.5]
    assert [parts[s]["weights"] / whole for s in range(4)] == [2, 2, 2, 0.5]
    assert {p["π_ref"] for p in parts.values()} == {2 * whole}


def test_what_it_says_of_weights_and_optimizer_is_what_a_rank_holds():
    config = prepare("bandit", ["learner.updates=1", "objective.name=dpo"])
    local = Local(config)
    assert [record.stepped for record in local.steps(1)] == [True]
    held = local.learner.engine.optimizer.state.values()
    moments = sum(
        value.numel() * value.element_size()
        for state in held
        for name, value in state.items()
        if torch.is_tensor(value) and name != "step"
    )
    parts = {r.name: r for r in dry_run.roles(config)}["learner rank"].parts
    assert parts["optimizer"] == moments
    assert parts["weights"] == 4 * sum(
        p.numel() for p in policy.parameters(local.learner.engine.policy)
    )


def test_what_does_not_fit_is_said_and_ends_with_1(capsys):
    assert main(["train", "gpu_1", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "pythia-1.4b" in told and "learner rank (0.5 GPU)" in told
    assert main(["train", "gpu_1", "cluster.gpu_gib=16", "--dry-run"]) == 1
    assert dry_run.MISFIT in capsys.readouterr().out


def test_an_architecture_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="policy.path"):
        known_shapes.shape("policy.path", str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", FULL_SCALE)
def test_a_full_scale_preset_resolves_and_fits_into_its_gpus_without_a_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = prepare(name, [])
    assert doctor_machine.gpus_wanted(config) <= FULL_SCALE[name]
    told = "\n".join(dry_run.lines(named(config)))
    assert "learner rank (1 GPU)" in told and dry_run.MISFIT not in told
    m, c = config.learner.minibatch, config.rollout.responses_per_prompt
    assert (m, c) == ((80, 10) if name == "alpaca_farm_best_of_n" else (64, c))
