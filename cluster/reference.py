"""π_ref in this process, for commands that need no learner."""

import numpy as np
from transformers.utils.logging import disable_progress_bar

from actors import policy
from configs.errors import ConfigError, one_line
from configs.schema import Config
from learner.stages.bandit import initial_policy


def reference_weights(config: Config) -> np.ndarray:
    """π_ref's, as a flat array; the bandit's are fitted where they are not cached.

    Raises ConfigError where `policy.path` cannot be loaded.
    """
    disable_progress_bar()
    try:
        path = initial_policy(config)
        return policy.flatten(policy.load_pretrained(config.policy, path, config.learner.precision))
    except OSError as error:
        problem = f"cannot be loaded: {one_line(str(error), 120)}"
        fix = "name a model directory with safetensors"
        raise ConfigError("policy.path", config.policy.path, problem, fix) from error
