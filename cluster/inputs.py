"""What a run reads: prompts, offline data, the reward. Opened once before anything starts, so that
a wrong file ends in one clear line and not in a half-started run."""

from typing import NamedTuple

from actors.preferences import OfflineGroup, read
from actors.prompts import PromptStream
from configs.schema import Config, DataSource
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
        tokenizer = AutoTokenizer.from_pretrained(config.policy.path)
    except (OSError, ValueError):
        return None
    return lambda text: tokenizer(text)["input_ids"]


def offline_data(config: Config, path: str) -> list[OfflineGroup]:
    """The offline data set, checked against the architecture's limits."""
    vocabulary, longest = limits(config)
    return read(
        path, config.rollout.responses_per_prompt, vocabulary, longest, config.rollout.max_tokens
    )


def check(config: Config) -> None:
    """Open everything; raises ValueError in one line for what cannot be used."""
    prompts(config)
    if config.data.source is DataSource.offline and config.data.path:
        offline_data(config, config.data.path)
    load(config.reward)
