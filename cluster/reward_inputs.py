"""What `reward` and `gold` read, looked at before a run starts, and whether it fits the policy."""

from pathlib import Path

from configs.choices import RewardKind
from configs.errors import ConfigError
from configs.schema import Config, RewardConfig
from reward_server import model_files, rewards


def check(config: Config, vocabulary: int) -> None:
    """ValueError in one line for a reward that cannot be used, or means other tokens.

    vocabulary: how many token ids the policy has.
    """
    for section in ("reward", "gold"):
        reward: RewardConfig = getattr(config, section)
        if reward.kind is RewardKind.none:
            continue
        rewards.check(reward, section=section)
        if reward.kind is RewardKind.model:
            _tokens_mean_the_same(config, section, reward, vocabulary)
        if reward.kind is RewardKind.length:
            _end_tokens_are_the_policys(config, section, reward)


def _tokens_mean_the_same(
    config: Config, section: str, reward: RewardConfig, vocabulary: int
) -> None:
    """A reward model reads the policy's token ids, so it must have the policy's tokenizer."""
    folder, key = model_files.directory(reward, section), f"{section}.path"
    theirs = model_files.tokenizer_file(str(folder), "")
    ours = _policys_tokenizer(config)
    if theirs is None and ours is None:
        known = model_files.vocabulary(folder) or 0
        if known < vocabulary:
            problem = f"it knows {known} token ids, and the policy has {vocabulary}"
            raise ConfigError(key, reward.path, problem, "name a model of the policy's vocabulary")
    elif theirs is None:
        problem = "has no tokenizer.json: whether its token ids mean what the policy's do is open"
        fix = "save the tokenizer that it was trained with there (save_pretrained)"
        raise ConfigError(key, reward.path, problem, fix)
    elif ours is None:
        problem = f"has no tokenizer.json to compare with that of {key}"
        fix = "save its tokenizer there (save_pretrained)"
        raise ConfigError("policy.path", config.policy.path, problem, fix)
    elif difference := model_files.tokenizer_difference(ours, theirs):
        problem = f"its tokenizer is not the policy's: {difference}"
        fix = "name a reward model that was trained with the tokenizer of policy.path"
        raise ConfigError(key, reward.path, problem, fix)


def _policys_tokenizer(config: Config) -> Path | None:
    """tokenizer.json of `policy.path`; the bandit has none."""
    if not config.policy.path:
        return None
    return model_files.tokenizer_file(config.policy.path, config.policy.revision)


def _end_tokens_are_the_policys(config: Config, section: str, reward: RewardConfig) -> None:
    """A length does not count what ends a response: exactly the tokens that stop generation."""
    ends: tuple[int, ...] = ()
    if config.policy.path:
        from actors import policy

        ends = policy.end_tokens(policy.architecture(config))
    if set(ends) != set(reward.end_tokens):
        key, are = f"{section}.end_tokens", f"[{','.join(map(str, ends))}]"
        raise ConfigError(key, reward.end_tokens, f"the policy's are {are}", f"set {key}={are}")
