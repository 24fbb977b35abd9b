"""A learner rank's part of a checkpoint: DeepSpeed's state and the weights that measures need.

DeepSpeed says what belongs to the state at every ZeRO stage; a writer of ours takes a copy of it,
which is all that training waits for, and writes it in a thread.
"""

import concurrent.futures
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from actors.codec import decode, encode
from actors.rollout import Version
from configs import faults

TAG = "learner"  # DeepSpeed's folder within a checkpoint
RING = "weights.tree"  # rank 0's: published versions that rollouts in the queue may carry

# What DeepSpeed's files hold beside tensors and plain data; anything else is refused unread.
torch.serialization.add_safe_globals(
    [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, OrderedDict, set, torch.Size]
)


class BackgroundWriter(CheckpointEngine):
    """DeepSpeed's door to the disk: copies at once, writes in a thread, reads no code."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "BackgroundWriter"
        self._waiting: list[Callable[[], object]] = []
        self._result: concurrent.futures.Future[None] | None = None

    def create(self, info: Any) -> None:
        """Nothing: the folder is there."""

    def save(self, state_dict: Any, path: str) -> None:
        copy = _copied(state_dict)
        self.later(lambda: torch.save(copy, path))

    def later(self, write: Callable[[], object]) -> None:
        """Have something written by the next `flush`."""
        self._waiting.append(write)

    def flush(self) -> None:
        """Write what waits, in a thread of its own: one that hangs does not hold up the next."""
        writes, self._waiting = self._waiting, []
        result: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                for write in writes:
                    write()
                result.set_result(None)
            except BaseException as error:
                result.set_exception(error)

        self._result = result
        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        return True

    def done(self) -> bool:
        """Whether the last flush is written; OSError where the disk refused it."""
        if self._result is None or not self._result.done():
            return False
        self._result.result()
        return True

    def wait(self) -> None:
        """Until the last flush is written; OSError where the disk refused it."""
        if self._result is not None:
            self._result.result()


def _copied(node: Any) -> Any:
    """The state with every tensor copied to the host."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return type(node)((key, _copied(value)) for key, value in node.items())
    if isinstance(node, list | tuple) and type(node) in (list, tuple):
        return type(node)(_copied(value) for value in node)
    return node


def save(learner: Any, writer: BackgroundWriter, folder: str, published: Any) -> None:
    """Have this rank's part written to `folder`; all ranks must call it.

    learner: a `learner.learner.Learner`. published: (version, flat weights) that actors may still
    be given, of rank 0.
    """
    state = {
        "version": list(learner.version),
        "round": learner.round,
        "kl_coefficient": learner.kl.coefficient,
        "rng": torch.get_rng_state(),
    }
    learner.engine.save(folder, state)
    if learner.rank == 0:
        writer.later(_ring_writer(learner, folder, published))
    writer.flush()


def _ring_writer(learner: Any, folder: str, published: Any) -> Callable[[], None]:
    """Writes the weights that measures and lagging actors need."""
    ring = learner.conditionals.weights if learner.conditionals is not None else {}
    tree = {
        "published": [[*version, flat] for version, flat in published],
        "ring": [[*version, flat] for version, flat in ring.items()],
    }

    def write() -> None:
        faults.hit("learner.write.before")
        (Path(folder) / RING).write_bytes(encode(tree))
        faults.hit("learner.write.after")

    return write


def load(learner: Any, folder: str, lineage: int) -> list[tuple[Version, np.ndarray]]:
    """Take a checkpoint's state, under a new lineage; all ranks must call it.

    Returns what was published then, oldest first, and not yet of no use.
    """
    state = learner.engine.load(folder)
    torch.set_rng_state(state["rng"])
    learner.version = Version(lineage, state["version"][1])
    learner.round = state["round"]
    learner.kl.coefficient = state["kl_coefficient"]
    tree = decode((Path(folder) / RING).read_bytes())
    if learner.conditionals is not None:
        ring = {Version(lin, step): flat for lin, step, flat in tree["ring"]}
        learner.conditionals.weights = ring
    return [(Version(lineage, step), flat) for _, step, flat in tree["published"]]
