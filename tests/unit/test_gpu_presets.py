"""The GPU presets, resolved and validated where no GPU is: what they ask for adds up."""

import importlib

import pytest

from cluster.doctor.machine import gpus_wanted
from configs.choices import EngineKind, Precision, Proximal, Ratio, RewardKind, Schedule, UpdateKind
from configs.load import load, prepare, resolve
from configs.schema_vllm import Transfer
from configs.validate import check
from learner.replay.staleness import plan
from reward_server.rewards import load as load_reward
from reward_server.rewards import score_safely

GPUS = {"gpu_1": 1, "gpu_8": 8, "gpu_2_nodes": 16}
PIPELINED = ["gpu_8", "gpu_2_nodes"]


@pytest.fixture(params=GPUS)
def name(request) -> str:
    return request.param


def test_it_loads_passes_the_rules_and_resolves_to_what_passes_them(name):
    config = load(name, [])
    check(config)
    resolved = resolve(config)
    check(resolved)
    plan(resolved)


def test_the_gpus_of_ranks_actors_and_evaluator_are_those_that_its_name_says(name):
    config = prepare(name, [])
    cluster, rollout = config.cluster, config.rollout
    trained = config.learner.ranks * cluster.learner_gpus
    generated = rollout.actors * cluster.actor_gpus
    assert trained + generated + cluster.evaluator_gpus <= GPUS[name]
    assert gpus_wanted(config) == pytest.approx(GPUS[name])
    assert rollout.vllm.tensor_parallel == max(1, cluster.actor_gpus)
    assert cluster.colocated == (name == "gpu_1") == (cluster.learner_gpus < 1)


def test_it_is_decoupled_ppo_in_bfloat16_under_zero(name):
    config = prepare(name, [])
    objective = config.objective
    assert (objective.name, objective.ratio) == ("ppo", Ratio.token)
    assert objective.proximal is Proximal.first_use
    assert config.learner.precision is Precision.bfloat16
    assert config.learner.zero_stage in (2, 3)


def test_vllm_generates_and_the_weights_travel_on_gpus(name):
    rollout = prepare(name, []).rollout
    assert rollout.engine is EngineKind.vllm and 0 < rollout.vllm.gpu_memory_utilization < 1
    assert rollout.transfer is (Transfer.ipc if name == "gpu_1" else Transfer.nccl)


@pytest.mark.parametrize("name", PIPELINED)
def test_the_pipelined_ones_update_in_flight_and_overlap_whole_rounds(name):
    config = prepare(name, [])
    assert config.replay.schedule is Schedule.pipelined
    assert config.rollout.update is UpdateKind.in_flight
    assert config.replay.max_age == 2 * config.steps_per_round - 1
    busy = config.rollout.actors * config.rollout.concurrent_leases * config.rollout.lease
    assert busy <= 2 * config.groups_per_round, "more would wait for admission"


def test_every_rank_has_equally_many_whole_groups(name):
    config = prepare(name, [])
    assert config.groups_per_step % config.learner.ranks == 0
    share = config.learner.minibatch // config.learner.ranks
    assert share % config.learner.micro_batch == 0
    assert config.rollout.responses_per_prompt >= 2, "the leave-one-out advantage compares"


def test_a_colocated_round_is_one_lease_so_that_vllm_sleeps_once_a_round():
    config = prepare("gpu_1", [])
    assert config.replay.schedule is Schedule.lockstep
    assert config.rollout.lease == config.groups_per_round


def test_its_reward_is_a_function_that_is_there_and_scores(name):
    config = prepare(name, [])
    assert config.reward.kind is RewardKind.function
    module, function = config.reward.path.split(":")
    assert hasattr(importlib.import_module(module), function)
    scores = score_safely(load_reward(config.reward), [[1], [1]], [[5, 5, 5, 5], [1, 2, 3, 4]])
    assert scores.reward.tolist() == [0.25, 1.0] and not scores.failures


def test_the_whole_is_another_policy_and_prompts_away_from_running_elsewhere(name):
    config = prepare(name, ["policy.path=/models/mine", "prompts.path=mine.parquet",
                            "prompts.source=parquet", "rollout.transfer=host"])  # fmt: skip
    check(config)
    assert prepare(name, []).policy.path and prepare(name, []).prompts.path
