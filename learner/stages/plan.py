"""What the driver and the ranks of a stage both know: its kinds, its steps, who computes what."""

from dataclasses import dataclass, replace

import numpy as np

from configs.schema import Config, LearnerConfig
from learner.stages.base import Stage
from learner.stages.reward_model import RewardModel
from learner.stages.sft import Sft
from learner.stages.source import Kind

SKIPS = 3  # steps in a row that are not finite, after which a stage ends


@dataclass
class StageStep:
    """A rank's record of a step. loss: its examples' share of the minibatch's; ranks' add up."""

    step: int  # how many are taken or skipped, this one included
    stepped: bool
    loss: float
    rate: float
    examples: int  # of the whole minibatch
    weight: int  # that its loss is divided by: response tokens, or pairs
    seconds: float


def open_stage(config: Config, kind: Kind) -> Stage:
    """The stage with its examples read. Raises ConfigError or DataError in one line."""
    return Sft(config) if kind == "sft" else RewardModel(config)


def steps_per_epoch(stage: Stage) -> int:
    """⌈examples to train on / minibatch⌉."""
    return -(-len(stage.train_k) // stage.settings.minibatch)


def learner_settings(config: Config, stage: Stage) -> LearnerConfig:
    """The stage's settings as the engine takes them."""
    own = stage.settings
    share = -(-own.minibatch // config.learner.ranks)
    return replace(
        config.learner, minibatch=own.minibatch, micro_batch=own.micro_batch or share,
        updates=own.epochs * steps_per_epoch(stage), lr=own.lr, schedule=own.schedule,
        warmup=own.warmup, weight_decay=own.weight_decay, max_grad_norm=own.max_grad_norm,
        lora=own.lora,
    )  # fmt: skip


def deal(examples: np.ndarray, length_n: np.ndarray, rank: int, ranks: int, size: int
         ) -> list[np.ndarray]:  # fmt: skip
    """One rank's micro-batches of at most `size`, equally many on every rank, some perhaps empty.

    Examples of about one length come together, so that little is padded and ranks have about
    equally much to do. length_n: of all examples, not of these alone.
    """
    ordered = examples[np.argsort(length_n[examples], kind="stable")]
    share = ordered[rank::ranks]
    most = -(-len(examples) // ranks)
    return [share[start : start + size] for start in range(0, most, size)]
