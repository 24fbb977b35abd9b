"""vLLM's weight transfer over shared memory: the side that runs in vLLM's worker process.

vLLM's own backends need GPUs. This one follows their protocol (start, update, finish; a version at
finish) with the weights in a buffer that the sender fills, see `actors.shared_memory`. vLLM imports
this module in its worker because `worker_extension_cls` names `WorkerExtension`; the import
registers the backend. Nothing else may import it: it needs vLLM.

Source: vllm 0.32.0, distributed/weight_transfer/{base,ipc_engine}.py.
"""

import logging
import os
import select
import signal
import threading
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

from actors.shared_memory import attach

BACKEND = "onpolicy_shared_memory"

# It warns of a tied output layer at every update; `receive_weights` checks that nothing is missing.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the flat float32 weights will be, and how they are cut (`actors.policy.layout`)."""

    path: str
    names: list[str]
    shapes: list[list[int]]
    owner: int  # process that talks to vLLM; when it is gone, so is the engine


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Nothing: the buffer holds the weights when an update starts."""


class SharedMemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads the buffer's weights into the model, layer by layer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        sizes = [torch.Size(shape).numel() for shape in init_info.shapes]
        flat = torch.from_numpy(attach(init_info.path, sum(sizes)))
        # Before any reload: vLLM's own parameters, tied ones once.
        self.parameters = {name for name, _ in self.model.named_parameters()}
        self.weights = [
            (name, piece.view(shape))
            for name, piece, shape in zip(init_info.names, flat.split(sizes), init_info.shapes)
        ]
        end_with(init_info.owner)

    def start_weight_update(self) -> None:
        # On CPU, vLLM prepacks linear weights and frees the originals: they cannot be written to.
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the base class's torch.accelerator.synchronize(), which needs an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        model: Any = self.model
        loaded = model.load_weights(self.weights)
        if loaded is not None and (missing := self.parameters - set(loaded)):
            raise RuntimeError(f"no weights came for {min(missing)}, of {len(missing)} in all")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                # Tied to the embedding it got no weights of its own, so the reload left its
                # prepacked copy (CPU) as it was.
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        self.weights = []


class WorkerExtension:
    """Named as vLLM's `worker_extension_cls`, so that its worker imports this module."""


def end_with(owner: int) -> None:
    """End vLLM's engine process when `owner` has died, also where nobody could tell it to.

    The worker that runs this follows its engine process by vLLM's own pipe.
    """
    try:
        watched = os.pidfd_open(owner)
    except OSError:  # already gone, or an old kernel
        return

    def watch() -> None:
        select.select([watched], [], [])
        os.kill(os.getppid(), signal.SIGTERM)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
