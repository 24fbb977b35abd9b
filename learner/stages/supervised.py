"""The loop that SFT and reward models share, as one rank sees it, without Ray.

    rank = Supervised(config, "sft", rank=0)          # after learner.engine.join
    rank.train(10)                                    # steps 1 … 10
    rank.evaluate()                                   # outputs of held-out examples
    rank.save(folder); rank.load(folder); rank.export(directory)

Step s of an epoch takes the s-th part of that epoch's keyed order. A position, the number of steps
taken or skipped, is all that a checkpoint has beside DeepSpeed's state: draws within a step
(dropout) are keyed by it.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from actors.randomness import stream_key
from configs.schema import Config
from learner import lora
from learner.engine import DeepSpeedEngine, learning_rate
from learner.stages.base import permutation
from learner.stages.plan import (
    SKIPS,
    StageStep,
    deal,
    learner_settings,
    open_stage,
    steps_per_epoch,
)
from learner.stages.source import Kind


class Supervised:
    """One rank of a stage."""

    def __init__(self, config: Config, kind: Kind, rank: int) -> None:
        self.config, self.rank = config, rank
        self.stage = open_stage(config, kind)
        self.learner = learner_settings(config, self.stage)
        network = lora.attach(
            self.stage.network(), self.learner.lora, config.seed, f"{kind}.lora",
            train_head=kind == "reward_model",
        )  # fmt: skip
        self.engine = DeepSpeedEngine(network.train(), self.learner, self.learner.ranks)
        self.position = 0
        self._skipped = 0  # in a row

    def minibatch(self, position: int) -> np.ndarray:
        """Numbers of the examples of the step that follows `position` steps, whatever the ranks."""
        parts = steps_per_epoch(self.stage)
        epoch, part = divmod(position, parts)
        train_k = self.stage.train_k
        order = permutation(self.config.seed, f"{self.stage.kind}/{epoch}", len(train_k))
        return np.array_split(train_k[order], parts)[part]

    def train(self, count: int) -> list[StageStep]:
        """So many steps; fewer at the end, and where SKIPS in a row were skipped."""
        records: list[StageStep] = []
        while len(records) < count and self.position < self.learner.updates:
            records.append(self._step())
            if self._skipped >= SKIPS:
                break
        return records

    def _step(self) -> StageStep:
        started = time.perf_counter()
        examples = self.minibatch(self.position)
        weight = int(self.stage.weight_n[examples].sum())
        key = stream_key(self.config.seed, f"{self.stage.kind}/{self.position}/{self.rank}")
        torch.manual_seed(key >> 1)
        loss = self.accumulate(examples, weight)
        rate = learning_rate(self.learner, self.position)
        stepped = self.engine.step(rate)
        self.position += 1
        self._skipped = 0 if stepped else self._skipped + 1
        seconds = time.perf_counter() - started
        return StageStep(self.position, stepped, loss, rate, len(examples), weight, seconds)

    def accumulate(self, examples: np.ndarray, weight: int) -> float:
        """Backward over this rank's share of a minibatch; returns its share of the loss."""
        parts = self._deal(examples)
        total = 0.0
        for number, part in enumerate(parts):
            loss = self.stage.losses(self._outputs(part, examples)).sum() / weight
            if not len(part):  # fills up
                loss = loss * 0.0
            self.engine.accumulate(loss * self.learner.ranks, number == len(parts) - 1)
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of this rank's held-out examples, and the network's outputs for them [n]."""
        network, held = self.engine.engine, self.stage.held_out_k
        network.eval()
        found = [(part, self._outputs(part, held)) for part in self._deal(held)]
        network.train()
        kept = [(part, output_N.cpu().numpy()) for part, output_N in found if len(part)]
        if not kept:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return np.concatenate([k for k, _ in kept]), np.concatenate([o for _, o in kept])

    def _deal(self, examples: np.ndarray) -> list[np.ndarray]:
        ranks, size = self.learner.ranks, self.learner.micro_batch
        return deal(examples, self.stage.length_n, self.rank, ranks, size)

    def _outputs(self, part: np.ndarray, examples: np.ndarray) -> Tensor:
        """Outputs of a micro-batch; of any example of the minibatch where it is empty."""
        return self.stage.outputs(self.engine.engine, part if len(part) else examples[:1])

    def save(self, folder: str) -> None:
        """Write this rank's state to a folder; all ranks must call it. OSError where it cannot."""
        self.engine.save(folder, {"position": self.position})
        self.engine.writer.flush()
        self.engine.writer.wait()

    def load(self, folder: str) -> None:
        """Take the state that `save` wrote; all ranks must call it."""
        self.position, self._skipped = self.engine.load(folder)["position"], 0

    def export(self, directory: str) -> None:
        """Write network and tokenizer as a model directory (safetensors); all ranks must call it.

        The weights are copied to a network of their own, since under ZeRO-3 no rank has them all.
        """
        trained = self.engine.engine.module
        pieces = self.engine.gathered()
        if self.rank:
            for _ in pieces:
                pass
            return
        whole = type(trained)(trained.config).to(next(trained.parameters()).dtype)
        _copy(pieces, dict(whole.named_parameters()))
        whole.save_pretrained(directory)
        if self.stage.source.tokenizer is not None:
            self.stage.source.tokenizer.save_pretrained(directory)


@torch.no_grad()
def _copy(pieces: Iterator[tuple[str, Tensor]], into: dict[str, Tensor]) -> None:
    for name, tensor in pieces:
        into[name].copy_(tensor)
