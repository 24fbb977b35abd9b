"""What a rollout engine is: the policy made to generate, under a version that it states."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from actors.prompts import Prompt
from actors.rollout import GroupId, Rollouts, Version

NO_VERSION = Version(-1, -1)  # an engine's that has no weights, or not all of some


class Request(NamedTuple):
    """One prompt to answer C times."""

    id: GroupId
    prompt: Prompt


class RolloutEngine(Protocol):
    """Generates groups of responses; every token carries the version that made it."""

    version: Version  # of the weights loaded last, or NO_VERSION

    def load(self, weights: np.ndarray, version: Version) -> None:
        """Take these weights (flat float32, `actors.policy.flatten`) as this version."""

    def generate(self, requests: Sequence[Request], stream: str) -> Rollouts:
        """C responses to each prompt, as one block without rewards.

        stream: names the random stream, so that evaluation never repeats training's draws.
        A prompt that cannot be answered comes back as `generation_failed`, never as an exception.
        """

    def score(self, text_NT: np.ndarray) -> np.ndarray:
        """log π of all tokens but the first of each text (int32), [N, T − 1] float32, in nats.

        At temperature 1, under the weights loaded last; the caller sees to it that nothing loads
        meanwhile. Raises what `load` and `generate` raise where the engine is gone.
        """

    def close(self) -> None:
        """Give back what the engine holds."""
