"""Stand-ins for the communication between GPUs, so that everything around it runs without one.

vLLM's trainer and worker classes, their rendezvous and their packing stay the real ones. In place
of NCCL a tensor travels over the TCP store of that rendezvous; in place of CUDA's memory handles a
table in this process. vLLM's worker process imports this module where `WORKER_EXTENSION` names
`WorkerExtension` below.
"""

import contextlib
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch

GPU = SimpleNamespace(uuid="GPU-stand-in")
SHARED: dict[int, torch.Tensor] = {}  # "device memory" by handle
_empty = torch.empty


class StoreCommunicator:
    """vLLM's PyNcclCommunicator as far as weight transfer uses it."""

    def __init__(self, host: str, port: int, rank: int, world: int, device: Any = None) -> None:
        from vllm.distributed.utils import StatelessProcessGroup

        self.group = StatelessProcessGroup.create(host, port, rank, world)
        self.rank, self.world_size, self.count = rank, world, 0
        self.ended = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Like NCCL's: a receiver waits for ever, unless `destroy` is called."""
        if self.rank == src:
            self.group.broadcast(tensor, src)
            return
        key = f"broadcast_tensor/{src}/{self.group.broadcast_recv_src_counter[src]}"
        while not self.group.store.check([key]):
            if self.ended.is_set():
                raise RuntimeError("the communicator was ended")
            time.sleep(0.001)
        tensor.copy_(self.group.broadcast(tensor, src))

    def destroy(self) -> None:
        self.ended.set()


class Stream:
    def synchronize(self) -> None:
        pass


def cpu_empty(*size: Any, **options: Any) -> torch.Tensor:
    if options.get("device") == "cuda":
        options.pop("device")
    return _empty(*size, **options)


def share(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """torch's reduce_tensor for a CUDA tensor; the 7th argument is the device."""
    SHARED[id(tensor)] = tensor
    return None, (id(tensor), 0, 0, 0, 0, 0, 0)


def patches() -> list[tuple[Any, str, Any]]:
    """Owner, attribute and stand-in of everything that needs a device."""
    import torch.multiprocessing.reductions as reductions
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    nothing = SimpleNamespace(synchronize=lambda: None)
    return [
        (nccl_common, "stateless_init_process_group", StoreCommunicator),
        (
            packed_tensor,
            "_get_streams",
            lambda device, count: tuple(Stream() for _ in range(count)),
        ),
        (packed_tensor, "reduce_tensor", share),
        (reductions, "rebuild_cuda_tensor", lambda *handle: SHARED[handle[0]]),
        (torch, "empty", cpu_empty),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "synchronize", lambda: None),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda *_: nothing),
        (torch.cuda, "get_device_properties", lambda *_: GPU),
        (torch.cuda, "ipc_collect", lambda: None),
    ]


class WorkerExtension:
    """For vLLM's worker: our transfer backends, over the stand-ins."""


def _in_worker() -> None:
    import multiprocessing

    if multiprocessing.parent_process() is None:
        return  # the tests' own process patches and takes back
    import actors.vllm_transfer  # noqa: F401

    for owner, name, value in patches():
        setattr(owner, name, value)


def in_ray_worker() -> None:
    """For every process of a run, as Ray's `worker_process_setup_hook`: the stand-ins where there
    is a learner or an actor, without importing their modules elsewhere."""
    from cluster.remote import Host

    begin = Host.__init__

    def begin_with_stand_ins(self: Any, target: str, *arguments: Any) -> None:
        if target.startswith("learner.worker:"):
            _in_learner()
        if target.startswith("cluster.rollout_worker:"):
            _in_actor()
        begin(self, target, *arguments)

    Host.__init__ = begin_with_stand_ins  # type: ignore[method-assign]


def _log(line: str) -> None:
    """To the file PUSH_LOG: epochs, and how each version came."""
    with open(os.environ["PUSH_LOG"], "a") as file:
        file.write(line + "\n")


def _in_learner() -> None:
    from learner.vllm_push import VllmTransport

    connect = VllmTransport.connect

    def stand_in_connect(self: Any, epoch: int, actors: Any) -> Any:
        for owner, name, value in patches():
            setattr(owner, name, value)
        _log(f"epoch {epoch} {sorted(actors)}")
        return connect(self, epoch, actors)

    VllmTransport.connect = stand_in_connect  # type: ignore[method-assign]


def _in_actor() -> None:
    from actors import vllm_engine, vllm_process, vllm_push

    vllm_process.WORKER_EXTENSION = "tests.stand_in.WorkerExtension"
    load, finish = vllm_engine.VllmEngine.load, vllm_push.Pushes._finish

    def logged_load(self: Any, weights: Any, version: Any) -> None:
        load(self, weights, version)
        _log(f"host {version.step}")

    async def logged_finish(self: Any, payload: Any) -> None:
        await finish(self, payload)
        _log(f"push {payload['version'][1]}")

    vllm_engine.VllmEngine.load = logged_load  # type: ignore[method-assign]
    vllm_push.Pushes._finish = logged_finish  # type: ignore[method-assign]


_in_worker()
