"""Sound settings pass every rule, and what passes resolves to settings that pass as well."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import ConfigError, prepare, resolve
from configs.validate import check
from tests.config_cases import GPUS, SHARED, VLLM, assert_one_line, bandit

QUICK = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    "overrides",
    [
        "objective.name=ppo rollout.responses_per_prompt=1",
        "objective.name=ppo learner.micro_batch=15",
        "rollout.engine=vllm policy.bandit.width=64 policy.bandit.heads=2",
        "rollout.engine=vllm rollout.update=in_flight replay.schedule=pipelined replay.order=ready"
        " policy.bandit.width=64 policy.bandit.heads=2",
        "policy.path=model prompts.source=jsonl prompts.path=a.jsonl rollout.engine=vllm",
        "reward.kind=function reward.path=package.rewards:score",
        "data.source=offline data.path=pairs.jsonl rollout.responses_per_prompt=2",
        "replay.samples_per_round=400 replay.inner_epochs=2 objective.name=ppo run.name=try",
        "replay.lag=3 replay.inner_epochs=1",
        "objective.name=ppo objective.proximal=first_use objective.importance_cap=2"
        " objective.mask_ratio=1.5",
        "objective.name=reinforce replay.inner_epochs=1 objective.importance=sequence"
        " objective.importance_cap=5",
        "replay.schedule=pipelined replay.inner_epochs=1 replay.max_age=0 rollout.actors=2",
        "objective.name=ppo objective.ratio=token objective.advantage=gae objective.kl_reward=0.2"
        " objective.kl_target=6 objective.proximal=first_use",
        "objective.name=reinforce replay.inner_epochs=1 objective.advantage=gae"
        " objective.importance=sequence objective.kl_loss=0.1",
        f"{VLLM} {GPUS} rollout.transfer=nccl rollout.actors=3 learner.ranks=2",
        f"{VLLM} rollout.transfer=nccl cluster.learner_gpus=1 cluster.actor_gpus=4"
        " rollout.vllm.tensor_parallel=4 replay.schedule=pipelined rollout.update=in_flight",
        f"{VLLM} {SHARED} rollout.transfer=ipc cluster.evaluator_gpus=0.1",
        f"{VLLM} {SHARED}",
        f"{VLLM} cluster.actor_gpus=0.5 rollout.actors=2",
        "learner.lora.rank=16 learner.lora.targets=c_attn,c_proj rollout.adapter_only=true",
        "sft.lora.rank=4 sft.lora.dropout=0.1 reward_model.lora.rank=8 data.streaming=true",
    ],
)
def test_sound_combinations_pass(overrides):
    check(prepare("bandit", overrides.split()))


@QUICK
@given(b=st.integers(1, 500), m=st.integers(1, 500), c=st.integers(1, 20),
       ranks=st.integers(1, 4), micro=st.integers(0, 100), t=st.integers(1, 10))  # fmt: skip
def test_what_passes_the_checks_resolves_to_what_passes_them(b, m, c, ranks, micro, t):
    config = bandit()
    config.replay.samples_per_round, config.learner.minibatch = b, m
    config.rollout.responses_per_prompt, config.learner.ranks = c, ranks
    config.learner.micro_batch, config.replay.inner_epochs = micro, t
    try:
        check(config)
    except ConfigError as error:
        assert_one_line(error)
        return
    resolved = resolve(config)
    check(resolved)
    assert resolved.steps_per_round * m == t * b
    assert resolved.learner.micro_batch % c == 0
