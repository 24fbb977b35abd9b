"""What the rules of the settings are tested on: overrides, a preset, and what each error says."""

import copy
import functools

from configs.load import ConfigError, load
from configs.schema import Config

VLLM = "rollout.engine=vllm policy.bandit.width=64 policy.bandit.heads=2"
GPUS = "cluster.learner_gpus=1 cluster.actor_gpus=1"
SHARED = "cluster.colocated=true cluster.learner_gpus=0.5 cluster.actor_gpus=0.4"


def assert_one_line(error: ConfigError) -> None:
    assert len(str(error).splitlines()) == 1
    assert error.problem and error.fix


@functools.cache
def _bandit() -> Config:
    return load("bandit", [])


def bandit() -> Config:
    """A fresh copy of the preset, without reading it again."""
    return copy.deepcopy(_bandit())
