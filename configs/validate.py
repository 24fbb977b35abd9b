"""Which settings fit together: one rule for each invariant, checked before anything starts."""

from configs.bounds import Rule, numbers_are_in_range
from configs.rules_algorithm import ALGORITHM_RULES
from configs.rules_data import DATA_RULES
from configs.rules_gpu import GPU_RULES
from configs.rules_lora import LORA_RULES
from configs.rules_penalties import PENALTY_RULES
from configs.rules_reward import REWARD_RULES
from configs.rules_system import SYSTEM_RULES
from configs.schema import Config

# In this order: a later rule may rely on what the earlier ones hold.
RULES: tuple[Rule, ...] = (
    numbers_are_in_range,
    *ALGORITHM_RULES,
    *PENALTY_RULES,
    *SYSTEM_RULES,
    *DATA_RULES,
    *REWARD_RULES,
    *GPU_RULES,
    *LORA_RULES,
)


def check(config: Config) -> None:
    """Raise ConfigError, naming key, value and a fix, where settings cannot work together.

    Holds for a config as loaded and as resolved.
    """
    for rule in RULES:
        rule(config)
