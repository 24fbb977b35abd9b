"""Rules on low-rank adapters, of training and of the stages.

Each rule raises ConfigError with a concrete fix.
"""

import re

from configs.bounds import Rule
from configs.choices import DataSource
from configs.errors import ConfigError
from configs.schema import Config
from configs.schema_lora import LoraConfig
from configs.schema_vllm import Transfer

_NAMES = re.compile(r"[\w.]+(,[\w.]+)*")


def lora_settings(config: Config) -> tuple[tuple[str, LoraConfig], ...]:
    """Section and settings of every adapter that there can be."""
    return (
        ("learner.lora", config.learner.lora),
        ("sft.lora", config.sft.lora),
        ("reward_model.lora", config.reward_model.lora),
    )


def lora_settings_have_a_rank(config: Config) -> None:
    """What describes an adapter is set only where there is one."""
    for section, lora in lora_settings(config):
        for name, usual in vars(LoraConfig()).items():
            value = getattr(lora, name)
            if not lora.rank and value != usual:
                fix = f"set {section}.rank=16, or {section}.{name}={usual}"
                problem = f"describes an adapter, and {section}.rank=0 has none"
                raise ConfigError(f"{section}.{name}", value, problem, fix)


def lora_targets_are_names(config: Config) -> None:
    """Names of layers, with commas between them."""
    for section, lora in lora_settings(config):
        if lora.targets and not _NAMES.fullmatch(lora.targets):
            key = f"{section}.targets"
            problem = "is not names of layers with commas between them"
            raise ConfigError(key, lora.targets, problem, f"set {key}=q_proj,v_proj or the like")


def adapter_only_updates_have_an_adapter(config: Config) -> None:
    """`rollout.adapter_only` needs an adapter, actors that use it, and the way by host."""
    rollout, key = config.rollout, "rollout.adapter_only"
    if not rollout.adapter_only:
        return
    off = f"{key}=false"
    if not config.learner.lora.rank:
        fix = f"set learner.lora.rank=16 or {off}"
        raise ConfigError(key, True, "learner.lora.rank=0 trains no adapter", fix)
    if config.data.source is DataSource.offline:
        raise ConfigError(key, True, "offline rollouts need no weights", f"set {off}")
    if rollout.transfer is not Transfer.host:
        problem = f"rollout.transfer={rollout.transfer.name} pushes merged weights"
        raise ConfigError(key, True, problem, f"set {off} or rollout.transfer=host")


LORA_RULES: tuple[Rule, ...] = (
    lora_settings_have_a_rank,
    lora_targets_are_names,
    adapter_only_updates_have_an_adapter,
)
