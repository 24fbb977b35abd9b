"""What a kind of stage says of itself: its examples, its network, its loss. The loop over them is
`learner.stages.supervised`.

Shapes: n examples (SFT's rows, a reward model's pairs), N of them in a micro-batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors import policy
from actors.randomness import stream_key
from actors.tables import DataError, Row, table_rows
from configs.errors import ConfigError
from configs.schema import Config
from learner import lora
from learner.stages.source import Kind, numbered, open_source, settings


class Stage(ABC):
    """The examples of a stage, read and checked, and what is done with them.

    length_n: tokens of an example, prompts included. weight_n: what it adds to the divisor of its
    minibatch's loss. train_k, held_out_k: numbers of the examples to train on, and of those of
    held-out prompts. dropped: rows that give no example, by reason.
    """

    kind: Kind
    unit: str  # of weight_n, as metrics name it

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, settings(config, self.kind)
        self.source = open_source(config, self.kind)
        lora.check(self.source.shape, self.settings.lora, f"{self.kind}.lora")
        context = policy.context_limit(self.source.shape)
        self.limit = min(context, self.settings.max_tokens or context)
        self.dropped = {"too_long": 0}
        self.rows = 0
        prompts: list[np.ndarray] = []
        for row in self._table():
            prompts += self.take(row)
            self.rows += 1
        self._check(prompts)
        self.length_n, self.weight_n = self.sizes()
        self.train_k, self.held_out_k = self._split(numbered(prompts))

    @abstractmethod
    def take(self, row: Row) -> Sequence[np.ndarray]:
        """Keep a row's examples and return the prompt of each; count in `dropped` where it has
        none. Raises DataError."""

    @abstractmethod
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """`length_n` and `weight_n`, int64, of the examples kept."""

    @abstractmethod
    def network(self) -> PreTrainedModel:
        """The network with its first weights, the same at every call."""

    @abstractmethod
    def outputs(self, network: nn.Module, examples: np.ndarray) -> Tensor:
        """What the network says of some examples, [N] float32."""

    @abstractmethod
    def losses(self, output_N: Tensor) -> Tensor:
        """The loss of each, [N], to be summed and divided by the minibatch's whole weight."""

    @abstractmethod
    def figures(self, output_n: np.ndarray, weight_n: np.ndarray) -> dict[str, float]:
        """What the outputs of the held-out examples come to, by name."""

    def _table(self) -> Iterator[Row]:
        if not self.settings.path:
            fix = "set it to a JSONL or Parquet file, or to a data set"
            raise ConfigError(f"{self.kind}.path", "", "there are no rows to learn from", fix)
        return table_rows(self.settings.path, self.settings.split, self.settings.subset)

    def _check(self, prompts: list[np.ndarray]) -> None:
        """DataError where no example is left."""
        if not prompts:
            reasons = ", ".join(f"{why} {count}" for why, count in self.dropped.items() if count)
            found = f"none of {self.rows} rows can be used ({reasons})" if self.rows else "no rows"
            raise DataError(f"{self.settings.path}: {found}; the limit is {self.limit} tokens")

    def _split(self, prompt_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the examples to train on and of those held out, by a keyed draw of prompts."""
        distinct, share = int(prompt_n.max()) + 1, self.settings.held_out
        count = max(1, round(share * distinct)) if share else 0
        if count >= distinct:
            problem = f"of {distinct} distinct prompts none would be left"
            fix = f"set {self.kind}.held_out=0 to train on all"
            raise ConfigError(f"{self.kind}.held_out", share, problem, fix)
        order = permutation(self.config.seed, f"{self.kind}/held_out", distinct)
        held = np.isin(prompt_n, order[:count])
        return np.flatnonzero(~held), np.flatnonzero(held)


def permutation(seed: int, stream: str, count: int) -> np.ndarray:
    """A keyed order of 0 … count − 1 (law 8)."""
    bits = np.random.Philox(key=stream_key(seed, stream))
    return np.random.Generator(bits).permutation(count)
