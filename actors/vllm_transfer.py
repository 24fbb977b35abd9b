"""vLLM's weight transfer: the side that runs in vLLM's worker process.

vLLM's own backends need GPUs. `SharedMemoryTransfer` follows their protocol (start, update, finish;
a version at finish) with the weights in a buffer that the sender fills, see `actors.shared_memory`.
`PushedTransfer` has that way and one of vLLM's own beside it, through which the learner pushes
(`learner.vllm_push`). vLLM imports this module in its worker because `worker_extension_cls` names
`WorkerExtension`; the import registers the backends. Nothing else may import it: it needs vLLM.

Source: vllm 0.32.0, distributed/weight_transfer/{base,nccl_engine,ipc_engine}.py.
"""

import contextlib
import logging
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from actors.shared_memory import FILLED, STAGED, UNSTAGED, attach
from actors.vllm_staging import CannotStage, Staging

# It warns of a tied output layer at every update; `receive_weights` checks that nothing is missing.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

FILLED_POLL = 0.0002  # seconds between looks at how far the buffer is filled


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the flat float32 weights will be, and how they are cut (`actors.policy.layout`)."""

    path: str
    names: list[str]
    shapes: list[list[int]]
    owner: int  # process that talks to vLLM; when it is gone, so is the engine


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Nothing: the buffer holds the weights when an update starts, or is about to where they are
    staged."""


class SharedMemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes the buffer's weights: on a CPU staged (`actors.vllm_staging`), where that can be; else
    loaded into the model by vLLM, layer by layer.

    The buffer's mark STAGED says which: UNSTAGED, or how many versions have been made ready.
    Staging begins at the start of an update, while the engine may generate; the other way begins
    when it may not.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    may_stage = True
    planned = False
    staging: Staging | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        sizes = [torch.Size(shape).numel() for shape in init_info.shapes]
        array, self.mark = attach(init_info.path, sum(sizes))
        self.flat = flat = torch.from_numpy(array)
        self.mark[STAGED] = UNSTAGED
        # Before any reload: vLLM's own parameters, tied ones once.
        self.parameters = {name for name, _ in self.model.named_parameters()}
        self.weights = [
            (name, piece.view(shape))
            for name, piece, shape in zip(init_info.names, flat.split(sizes), init_info.shapes)
        ]
        end_with(init_info.owner, self._let_go)

    def start_weight_update(self) -> None:
        if not self.planned:
            self._plan()
        if self.staging is not None:
            self.staging.begin(self._staged)
        else:
            # On CPU, vLLM packs linear weights and frees the originals: nothing to write to.
            initialize_layerwise_reload(self.model)

    def _plan(self) -> None:
        """Decide for one of the two ways, at the first update: vLLM's settings are at hand then."""
        self.planned = True
        if not self.may_stage or self.device.type != "cpu" or self.parallel_config.world_size > 1:
            return
        with contextlib.suppress(CannotStage):
            self.staging = Staging(self.model, self.flat, self._load, self._arrived)
            self.mark[STAGED] = 0

    def _staged(self, _: Any) -> None:
        self.mark[STAGED] += 1

    def _arrived(self, count: int) -> None:
        """Wait until so many weights are in the buffer."""
        while self.mark[FILLED] < count:
            time.sleep(FILLED_POLL)

    def _let_go(self) -> None:
        """Nobody writes any more: have nothing wait for it, so that this process can end."""
        self.mark[FILLED] = self.flat.numel()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the base class's torch.accelerator.synchronize(), which needs an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if self.staging is not None:
            self.staging.swap()
        else:
            self._load()

    def _load(self) -> None:
        """Have vLLM's own loader copy the buffer's weights."""
        model: Any = self.model
        loaded = model.load_weights(self.weights)
        if loaded is not None and (missing := self.parameters - set(loaded)):
            raise RuntimeError(f"no weights came for {min(missing)}, of {len(missing)} in all")

    def finish_weight_update(self) -> None:
        if self.staging is not None:
            self.staging.packed = None  # of an update that was given up
            return
        self._finalize()
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                # Tied to the embedding it got no weights of its own, so the reload left its
                # prepacked copy (CPU) as it was.
                module.quant_method.process_weights_after_loading(module)

    def _finalize(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.weights = []


@dataclass
class PushInfo(WeightTransferInitInfo):
    """A new epoch of pushes: vLLM's own init info, and how long an update may take."""

    push: dict[str, Any]
    seconds: float


class PushedTransfer(SharedMemoryTransfer):
    """Shared memory, and pushes from the learner's GPU through vLLM's backend `pushed_by`.

    A push that has not arrived in time is abandoned from this side too: its communicator is ended,
    the half-loaded model put in order, and the update fails. The engine then takes the weights
    through shared memory.
    """

    pushed_by: str
    may_stage = False  # a push writes to the live weights

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        pushed = WeightTransferEngineFactory._registry[self.pushed_by]()
        self.pushed: WeightTransferEngine[Any, Any] = pushed(*arguments, **named)
        self.seconds = 0.0
        self.by_push = False

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return super().parse_init_info(init_dict) if "path" in init_dict else PushInfo(**init_dict)

    def init_transfer_engine(self, init_info: InitInfo | PushInfo) -> None:
        if isinstance(init_info, InitInfo):
            super().init_transfer_engine(init_info)
            return
        self.seconds = init_info.seconds
        self.pushed.shutdown()  # the epoch before
        self.pushed.init_transfer_engine(self.pushed.parse_init_info(init_info.push))

    def start_weight_update(self) -> None:
        self.by_push = False
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """With `push`, vLLM's own update info, one chunk of a push; else the buffer's weights.

        handles: of ipc, pickled by the learner's process, since vLLM's messages carry no types.
        """
        if not update_info:
            super().update_weights(update_info)
            return
        info, self.by_push = dict(update_info["push"]), True
        if "handles" in update_info:
            info["ipc_handles"] = pickle.loads(update_info["handles"])
        late = threading.Event()
        timer = threading.Timer(self.seconds, self._abandon, [late])
        timer.daemon = True
        timer.start()
        try:
            self.pushed.update_weights(info)
            if late.is_set():
                raise RuntimeError("what came after its communicator was ended")
        except BaseException as error:
            # Layers that have a part of their weights would count it with the next update's.
            finalize_layerwise_reload(self.model, self.model_config)
            if late.is_set():
                why = f"weights pushed by {self.pushed_by} took over {self.seconds} s"
                raise TimeoutError(why) from error
            raise
        finally:
            timer.cancel()

    def _abandon(self, late: threading.Event) -> None:
        late.set()
        self.pushed.shutdown()  # NCCL: abort, which ends the broadcast that waits

    def _finalize(self) -> None:
        if self.by_push:
            self.pushed.finish_weight_update()
        else:
            super()._finalize()

    def shutdown(self) -> None:
        self.pushed.shutdown()
        super().shutdown()


class NcclTransfer(PushedTransfer):
    """Broadcasts from the learner's GPU."""

    pushed_by = "nccl"


class IpcTransfer(PushedTransfer):
    """The learner's memory on the same GPU."""

    pushed_by = "ipc"


class WorkerExtension:
    """Named as vLLM's `worker_extension_cls`, so that its worker imports this module."""


def end_with(owner: int, before: Callable[[], None]) -> None:
    """End vLLM's engine process when `owner` has died, also where nobody could tell it to.

    The worker that runs this follows its engine process by vLLM's own pipe.
    """
    try:
        watched = os.pidfd_open(owner)
    except OSError:  # already gone, or an old kernel
        return

    def watch() -> None:
        select.select([watched], [], [])
        before()
        os.kill(os.getppid(), signal.SIGTERM)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


BACKENDS = {  # the names are those of actors.vllm_process
    "onpolicy_host": SharedMemoryTransfer,
    "onpolicy_nccl": NcclTransfer,
    "onpolicy_ipc": IpcTransfer,
}
for name, backend in BACKENDS.items():
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, backend)
