"""Every invariant of the settings has a rule, and every rule names its key and a fix."""

import dataclasses
import math
import typing

import pytest

from configs import load as loading
from configs.bounds import BOUNDS, UNBOUNDED, numbers_are_in_range
from configs.load import ConfigError, load
from configs.schema import Config
from configs.validate import RULES, check
from tests.config_cases import GPUS, SHARED, VLLM, assert_one_line, bandit

# rule, what breaks it (on the preset `bandit`), the key named, a part of the fix
BROKEN = [
    ("numbers_are_in_range", "learner.lr=0", "learner.lr", "learner.lr=0.001"),
    ("numbers_are_in_range", "learner.lr=nan", "learner.lr", "a number"),
    ("objective_is_known", "objective.name=ipoo", "objective.name", "objective.name=ipo"),
    ("minibatch_holds_whole_groups", "learner.minibatch=33", "learner.minibatch", "=30 or 40"),
    ("round_holds_whole_groups", "replay.samples_per_round=105", "replay.samples_per_round",
     "=100 or 110"),
    ("round_holds_whole_minibatches", "learner.minibatch=70", "replay.samples_per_round",
     "learner.minibatch=50 or 20"),
    ("group_wise_objective_has_groups", "rollout.responses_per_prompt=1",
     "rollout.responses_per_prompt", "responses_per_prompt=2"),
    ("leave_one_out_has_others",
     "rollout.responses_per_prompt=1 objective.name=ppo objective.advantage=leave_one_out",
     "objective.advantage", "objective.advantage=standardised"),
    ("proximal_policy_is_clipped_against", "objective.proximal=first_use", "objective.proximal",
     "objective.name=ppo"),
    ("importance_weight_is_read", "objective.importance=token", "objective.importance",
     "objective.importance=none"),
    ("importance_weight_is_read", "objective.name=ppo objective.importance=token",
     "objective.importance", "objective.importance=none"),
    ("importance_weight_is_read", "objective.importance_cap=2", "objective.importance_cap",
     "objective.name=ppo objective.proximal=first_use"),
    ("importance_weight_is_read", "objective.name=ppo objective.importance_cap=2",
     "objective.importance_cap", "or objective.proximal=first_use"),
    ("importance_weight_is_read",
     "objective.name=reinforce replay.inner_epochs=1 objective.importance_cap=2",
     "objective.importance_cap", "or objective.importance=token"),
    ("mask_ratio_is_read", "objective.mask_ratio=2", "objective.mask_ratio",
     "objective.mask_ratio=null"),
    ("value_head_has_a_policy_gradient", "objective.advantage=gae", "objective.advantage",
     "objective.name=ppo or reinforce"),
    ("value_head_has_a_policy_gradient", "objective.name=ppo objective.advantage=gae",
     "objective.advantage", "objective.ratio=token"),
    ("kl_reward_has_a_value_head", "objective.kl_reward=0.1", "objective.kl_reward",
     "objective.kl_loss"),
    ("kl_reward_has_a_value_head", "objective.name=ppo objective.kl_reward=0.1",
     "objective.kl_reward", "objective.advantage=gae"),
    ("kl_target_steers_a_penalty",
     "objective.name=ppo objective.ratio=token objective.advantage=gae objective.kl_target=6",
     "objective.kl_target", "objective.kl_reward=0.2"),
    ("kl_loss_is_on_samples_of_the_policy", "data.source=offline objective.kl_loss=0.1",
     "objective.kl_loss", "data.source=on_policy"),
    ("every_rank_has_a_group", "learner.ranks=11", "learner.ranks", "learner.ranks=10"),
    ("micro_batch_fits", "learner.micro_batch=110", "learner.micro_batch", "micro_batch=100"),
    ("micro_batch_fits", "learner.micro_batch=15", "learner.micro_batch", "=10 or 20"),
    ("packing_keeps_no_distributions", "learner.packing=true learner.exact_kl=true",
     "learner.packing", "learner.exact_kl=false"),
    ("source_fits_objective", "objective.name=pref_ft", "data.source", "data.source=offline"),
    ("source_fits_objective", "objective.name=ppo data.source=offline", "data.source",
     "data.source=on_policy"),
    ("reuse_fits_objective", "objective.name=reinforce", "replay.inner_epochs",
     "replay.inner_epochs=1"),
    ("quantiles_rise", "objective.quantile_start=0.95", "objective.quantile_start", "=0.9"),
    ("warmup_ends", "learner.warmup=2000", "learner.warmup", "learner.warmup=100"),
    ("offline_rollouts_have_no_age", "data.source=offline replay.schedule=pipelined",
     "replay.schedule", "replay.schedule=lockstep"),
    ("offline_rollouts_have_no_age", "data.source=offline replay.lag=1", "replay.lag",
     "replay.lag=0"),
    ("offline_rollouts_have_no_age", "data.source=offline replay.max_age=9", "replay.max_age",
     "replay.max_age=null"),
    ("budget_can_be_kept", "replay.max_age=8", "replay.max_age", "replay.max_age=9"),
    ("budget_can_be_kept", "replay.max_age=9 replay.lag=1", "replay.max_age", "max_age=10"),
    ("data_path_is_used", "data.path=pairs.jsonl", "data.path", "data.source=offline"),
    ("ready_order_is_pipelined", "replay.order=ready", "replay.order", "schedule=pipelined"),
    ("in_flight_updates_can_happen", "rollout.update=in_flight", "rollout.update", "engine=vllm"),
    ("in_flight_updates_can_happen", "rollout.update=in_flight rollout.engine=vllm",
     "rollout.update", "replay.schedule=pipelined"),
    ("heads_divide_the_width", "policy.bandit.width=50", "policy.bandit.width", "=48 or 51"),
    ("vllm_knows_the_head_size", "rollout.engine=vllm", "policy.bandit.width",
     "policy.bandit.width=64 policy.bandit.heads=2"),
    ("prompts_have_a_source", "prompts.source=jsonl", "prompts.path", "set prompts.path"),
    ("prompts_have_a_source", "prompts.path=a.jsonl", "prompts.path", "prompts.source=jsonl"),
    ("bandit_contexts_are_tokens", "prompts.count=101", "prompts.count", "from 1 to 100"),
    ("bandit_contexts_are_tokens", "prompts.count=0", "prompts.count", "from 1 to 100"),
    ("bandit_contexts_are_tokens", "policy.path=model", "prompts.source", "prompts.source=jsonl"),
    ("something_is_trained_on", "reward.kind=none", "reward.kind", "reward.kind=peak"),
    ("reward_path_fits_its_kind", "reward.kind=function", "reward.path", "module:function"),
    ("reward_path_fits_its_kind", "reward.kind=function reward.path=a.py", "reward.path",
     "module:function"),
    ("reward_path_fits_its_kind", "reward.path=a:b", "reward.path", "reward.kind=function"),
    ("reward_path_fits_its_kind", "gold.kind=model", "gold.path", "gold.revision"),
    ("reward_path_fits_its_kind", "gold.path=a:b", "gold.path", "gold.kind=function"),
    ("end_tokens_are_ids", "reward.kind=length reward.end_tokens=[0,-1]", "reward.end_tokens",
     "reward.end_tokens=[0]"),
    ("gold_has_no_service", "gold.kind=peak gold.port=8000", "gold.port", "gold.port=0"),
    ("gold_has_no_service", "gold.kind=peak gold.replicas=2", "gold.replicas", "gold.replicas=1"),
    ("run_name_is_a_file_name", "run.name=a/b", "run.name", "run.name=a_b"),
    ("run_name_is_a_file_name", "run.name=..", "run.name", "run.name=try"),
    ("metrics_are_no_faster_than_rays", "cluster.metrics_seconds=0.5", "cluster.metrics_seconds",
     "cluster.metrics_seconds=1"),
    ("run_dir_is_a_path", "run.dir=s3://bucket/runs", "run.dir", "all nodes share"),
    ("mirror_is_an_address", "run.mirror=/backup", "run.mirror", "file:///backup"),
    ("mirror_is_an_address", "run.mirror=s3://key:secret@bucket/a", "run.mirror", "other means"),
    ("mirror_is_an_address", "run.mirror=abfs://a@b/c?sig=secret", "run.mirror", "other means"),
    ("trackers_are_known", "run.trackers=tensorboard,mlflow", "run.trackers", "tensorboard"),
    ("trackers_are_known", "run.trackers=tensorboard,tensorboard", "run.trackers",
     "run.trackers=tensorboard"),
    ("faults_are_known", "cluster.faults=actor.put.before@1:burn", "cluster.faults", "kill, hang"),
    ("length_network_has_whole_heads", "length_data.width=72", "length_data.width", "=64 or 80"),
    ("length_responses_have_their_mode", "length_data.mode=55", "length_data.mode", "=20"),
    ("length_network_holds_the_longest", "length_data.context=66", "length_data.context",
     "length_data.context=67"),
    ("lora_settings_have_a_rank", "learner.lora.alpha=8", "learner.lora.alpha",
     "learner.lora.rank=16, or learner.lora.alpha=16"),
    ("lora_settings_have_a_rank", "sft.lora.targets=q_proj", "sft.lora.targets",
     "sft.lora.rank=16"),
    ("lora_targets_are_names", "reward_model.lora.rank=4 reward_model.lora.targets=q_proj,,v",
     "reward_model.lora.targets", "reward_model.lora.targets=q_proj,v_proj"),
    ("adapter_only_updates_have_an_adapter", "rollout.adapter_only=true", "rollout.adapter_only",
     "learner.lora.rank=16"),
    ("adapter_only_updates_have_an_adapter",
     "rollout.adapter_only=true learner.lora.rank=8 data.source=offline", "rollout.adapter_only",
     "rollout.adapter_only=false"),
    ("adapter_only_updates_have_an_adapter",
     f"rollout.adapter_only=true learner.lora.rank=8 {VLLM} {GPUS} rollout.transfer=nccl",
     "rollout.adapter_only", "rollout.transfer=host"),
    ("transfer_has_gpus", "rollout.transfer=nccl", "rollout.transfer", "rollout.engine=vllm"),
    ("transfer_has_gpus", f"{VLLM} rollout.transfer=nccl", "rollout.transfer",
     "cluster.learner_gpus=1 cluster.actor_gpus=1"),
    ("transfer_has_gpus", f"{VLLM} rollout.transfer=ipc cluster.actor_gpus=0.5",
     "rollout.transfer", "cluster.learner_gpus=0.5 cluster.actor_gpus=0.4"),
    ("transfer_has_gpus",
     f"{VLLM} rollout.transfer=nccl cluster.learner_gpus=0.5 cluster.actor_gpus=0.5",
     "rollout.transfer", "cluster.learner_gpus=1"),
    ("transfer_has_gpus", f"{VLLM} {GPUS} rollout.transfer=nccl data.source=offline",
     "rollout.transfer", "rollout.transfer=host"),
    ("pushed_weights_are_the_newest", f"{VLLM} {GPUS} rollout.transfer=nccl replay.lag=1",
     "replay.lag", "replay.lag=0"),
    ("pushed_weights_are_the_newest",
     f"{VLLM} {GPUS} rollout.transfer=nccl replay.schedule=pipelined", "rollout.update",
     "rollout.update=in_flight"),
    ("colocation_fits_transfer", f"{VLLM} {GPUS} rollout.transfer=ipc", "rollout.transfer",
     "cluster.colocated=true"),
    ("colocation_fits_transfer", f"{VLLM} {GPUS} rollout.transfer=nccl cluster.colocated=true",
     "rollout.transfer", "rollout.transfer=ipc"),
    ("colocated_take_turns", "cluster.colocated=true", "cluster.colocated",
     "rollout.engine=vllm"),
    ("colocated_take_turns", f"{VLLM} {SHARED} data.source=offline", "cluster.colocated",
     "data.source=on_policy"),
    ("colocated_take_turns", f"{VLLM} {SHARED} replay.schedule=pipelined", "cluster.colocated",
     "replay.schedule=lockstep"),
    ("colocated_take_turns", f"{VLLM} {SHARED} rollout.actors=2", "cluster.colocated",
     "rollout.actors=1 learner.ranks=1"),
    ("colocated_take_turns", f"{VLLM} {SHARED} learner.ranks=2", "cluster.colocated",
     "rollout.actors=1 learner.ranks=1"),
    ("colocated_take_turns", f"{VLLM} {SHARED} cluster.evaluator_gpus=0.2", "cluster.colocated",
     "cluster.evaluator_gpus=0.1"),
    ("colocated_take_turns", f"{VLLM} cluster.colocated=true", "cluster.colocated",
     "cluster.learner_gpus=0.5"),
    ("tensor_parallel_is_the_actors_gpus", "rollout.vllm.tensor_parallel=2",
     "rollout.vllm.tensor_parallel", "rollout.engine=vllm"),
    ("tensor_parallel_is_the_actors_gpus", f"{VLLM} rollout.vllm.tensor_parallel=2",
     "rollout.vllm.tensor_parallel", "cluster.actor_gpus=2"),
    ("tensor_parallel_is_the_actors_gpus", f"{VLLM} cluster.actor_gpus=4",
     "rollout.vllm.tensor_parallel", "tensor_parallel=4"),
    ("placed_parts_reserve_something", "cluster.nodes.actors=role=rollout",
     "cluster.nodes.actors", "cluster.actor_cpus=1"),
    ("placed_parts_reserve_something", "cluster.nodes.reward=reward cluster.reward_cpus=1",
     "cluster.nodes.reward", "cluster.nodes.reward=role=reward"),
    ("placed_parts_reserve_something", "cluster.nodes.ranks=strict_pack", "cluster.nodes.ranks",
     "cluster.learner_cpus=1"),
    ("colocated_parts_name_one_node",
     f"{VLLM} {SHARED} rollout.transfer=ipc cluster.nodes.learner=a=b cluster.nodes.actors=a=c",
     "cluster.nodes.actors", "cluster.nodes.actors=a=b"),
    ("tensor_parallel_is_the_actors_gpus", f"{VLLM} cluster.actor_gpus=1.5",
     "rollout.vllm.tensor_parallel", "cluster.actor_gpus=2"),
]  # fmt: skip


@pytest.mark.parametrize("rule, overrides, key, fix", BROKEN)
def test_a_broken_invariant_names_its_key_and_a_fix(rule, overrides, key, fix):
    config = load("bandit", overrides.split())
    with pytest.raises(ConfigError) as alone:
        next(r for r in RULES if r.__name__ == rule)(config)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert str(alone.value) == str(caught.value)
    assert_one_line(caught.value)
    assert caught.value.key == key and fix in caught.value.fix


def test_every_rule_has_a_failing_case():
    assert {rule for rule, *_ in BROKEN} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("key", BOUNDS)
def test_a_number_out_of_range_names_its_key_and_one_within(key):
    bound = BOUNDS[key]
    for end, is_open in ((bound.low, bound.open_low), (bound.high, bound.open_high)):
        if not math.isfinite(end) or end > 2**62:
            continue
        outside = end if is_open else end + (1 if end == bound.high else -1)
        with pytest.raises(ConfigError) as caught:
            numbers_are_in_range(with_value(key, outside))
        assert caught.value.key == key
        assert_one_line(caught.value)
        suggested = caught.value.fix.partition(f"{key}=")[2]
        numbers_are_in_range(with_value(key, float(suggested)))


def test_every_number_has_a_range():
    numeric = {key for key, hint in loading._leaves().items() if _is_number(hint)}
    missing = numeric - set(BOUNDS) - set(UNBOUNDED)
    assert not missing, f"add to configs/bounds.py: {missing}"
    assert set(BOUNDS) | set(UNBOUNDED) <= numeric


def with_value(key: str, value: float) -> Config:
    config = bandit()
    *sections, leaf = key.split(".")
    owner: object = config
    for section in sections:
        owner = getattr(owner, section)
    assert dataclasses.is_dataclass(owner)
    setattr(owner, leaf, value)
    return config


def _is_number(hint: object) -> bool:
    lists = typing.get_origin(hint) is list
    kinds = () if lists else typing.get_args(hint) or (hint,)
    return any(kind in (int, float) for kind in kinds)
