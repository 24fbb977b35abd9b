"""vLLM's own trainer and worker classes for nccl and ipc, over stand-ins for the devices only."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.rollout import Version
from configs.schema_vllm import Transfer
from learner import vllm_push
from learner.transfer import TransferGroup
from learner.vllm_push import VllmTransport
from tests import stand_in
from tests.harness import settings

pytest.importorskip("vllm")

SECONDS = 20.0


@pytest.fixture
def devices(monkeypatch):
    """Stand-ins for what needs a GPU; layers are plain modules, loaded by name."""
    from vllm.model_executor.model_loader import reload

    import actors.vllm_transfer as ours

    for owner, name, value in stand_in.patches():
        monkeypatch.setattr(owner, name, value)
    for owner in (reload, ours):
        monkeypatch.setattr(owner, "initialize_layerwise_reload", lambda model: None)
        monkeypatch.setattr(owner, "finalize_layerwise_reload", lambda *_: None)


class Model(torch.nn.Module):
    """As a vLLM model is loaded: by name and tensor."""

    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.held = torch.nn.ParameterDict(
            {str(n): torch.nn.Parameter(torch.zeros(size)) for n, size in enumerate(sizes)}
        )

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.held[name].data.copy_(tensor)


class Engine:
    """An actor's vLLM engine of several GPUs: the real worker-side class on each."""

    def __init__(self, transfer: str, sizes: list[tuple[int, ...]], gpus: int) -> None:
        import actors.vllm_transfer as ours

        kind = {"nccl": ours.NcclTransfer, "ipc": ours.IpcTransfer}[transfer]
        self.version = Version(-1, -1)
        self.ranks_met: list[int] = []
        self.models = [Model(sizes) for _ in range(gpus)]
        self.workers = [
            kind(None, SimpleNamespace(parallel_config=parallel(gpus, rank), model_config=None),
                 torch.device("cpu", 0), model)
            for rank, model in enumerate(self.models)
        ]  # fmt: skip

    def push(self, step: str, payload: dict[str, Any]) -> None:
        payload = pickle.loads(pickle.dumps(payload))  # it goes through Ray and vLLM's messages
        with ThreadPoolExecutor(len(self.workers)) as threads:
            list(threads.map(lambda worker: self._one(worker, step, payload), self.workers))
        if step == "finish":
            self.version = Version(*payload["version"])

    def _one(self, worker: Any, step: str, payload: dict[str, Any]) -> None:
        if step == "init":
            info = {"push": payload, "seconds": SECONDS}
            worker.init_transfer_engine(worker.parse_init_info(info))
        elif step == "start":
            worker.start_weight_update()
        elif step == "update":
            worker.update_weights(payload)
        elif step == "finish":
            worker.finish_weight_update()


def parallel(gpus: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(data_parallel_index=0, world_size=gpus, rank=rank)


def ask(engines: Any, step: str, payloads: Any) -> dict[int, str]:
    failed: dict[int, str] = {}

    def one(index: int) -> None:
        try:
            engines[index].push(step, payloads[index])
        except BaseException as error:
            failed[index] = str(error)

    if step == "ready":
        return {}
    threads = [threading.Thread(target=one, args=[index]) for index in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


SIZES = [(40, 10), (3,), (7, 5), (100,), (2, 2)]


def pushed(transfer: str, engines: dict[int, Engine], gpus: int, versions: int) -> TransferGroup:
    config = settings("gpu_8")
    config.rollout.transfer = Transfer[transfer]
    config.rollout.vllm.tensor_parallel = gpus
    layout = [(str(n), torch.float32, size) for n, size in enumerate(SIZES)]
    group = TransferGroup(VllmTransport(config, layout, ask, "127.0.0.1"), SECONDS)
    for index, engine in engines.items():
        group.join(index, engine)
    for step in range(1, versions + 1):
        sending = group.begin(Version(0, step))
        assert sending is not None
        for name, _, size in layout:
            sending.feed(name, torch.full(size, 100.0 * step + int(name)))
        assert sending.end(), sending.failure
    return group


@pytest.mark.parametrize("buffer", [64, 2**20])  # bytes: each parameter alone, all in one
@pytest.mark.parametrize(
    "transfer, actors, gpus", [("nccl", 1, 1), ("nccl", 3, 2), ("nccl", 2, 4), ("ipc", 1, 1)]
)
def test_every_gpu_of_every_engine_gets_all_weights_of_each_version(
    devices, monkeypatch, transfer, actors, gpus, buffer
):
    monkeypatch.setattr(vllm_push, "BUFFER_BYTES", buffer)
    engines = {index: Engine(transfer, SIZES, gpus) for index in range(actors)}
    group = pushed(transfer, engines, gpus, versions=3)
    for engine in engines.values():
        assert engine.version == Version(0, 3)
        for model in engine.models:
            for name, held in model.held.items():
                assert (held == 300.0 + int(name)).all()
    assert group.state.epoch == 1 and group.failures == 0


def test_a_group_that_grows_meets_anew_and_the_newcomer_gets_the_version(devices):
    engines = {0: Engine("nccl", SIZES, 1)}
    group = pushed("nccl", engines, 1, versions=1)
    group.join(1, late := Engine("nccl", SIZES, 1))
    sending = group.begin(Version(0, 2))
    for n, size in enumerate(SIZES):
        sending.feed(str(n), torch.full(size, 7.0))
    assert sending.end() and group.state.epoch == 2
    for engine in (engines[0], late):
        assert engine.version == Version(0, 2) and (engine.models[0].held["3"] == 7.0).all()


def test_an_engine_that_fails_to_load_ends_the_push_for_all_and_the_next_one_reaches_them(devices):
    engines = {index: Engine("nccl", SIZES, 1) for index in range(2)}
    group = pushed("nccl", engines, 1, versions=1)
    broken = engines[1].models[0]
    broken.load_weights = lambda weights: 1 / 0
    sending = group.begin(Version(0, 2))
    for n, size in enumerate(SIZES):
        sending.feed(str(n), torch.zeros(size))
    assert not sending.end() and "rollout actor 1 at update" in str(sending.failure)
    assert {engine.version for engine in engines.values()} == {Version(0, 1)}
    del broken.load_weights
    sending = group.begin(Version(0, 3))
    for n, size in enumerate(SIZES):
        sending.feed(str(n), torch.ones(size))
    assert sending.end() and group.state.epoch == 2
    assert {engine.version for engine in engines.values()} == {Version(0, 3)}


def test_a_worker_whose_learner_stops_sending_gives_up_in_time(devices, monkeypatch):
    engine = Engine("nccl", SIZES, 1)
    pushed("nccl", {0: engine}, 1, versions=1)
    (worker,) = engine.workers
    worker.seconds = 0.2
    info = {"names": ["0"], "dtype_names": ["float32"], "shapes": [[40, 10]]}
    with pytest.raises(TimeoutError, match=r"weights pushed by nccl took over 0.2 s"):
        worker.update_weights({"push": info})


def test_the_engine_arguments_of_each_gpu_preset(tmp_path):
    from transformers import GPTNeoXConfig

    from actors.vllm_process import engine_arguments

    shape = GPTNeoXConfig()
    one = engine_arguments(settings("gpu_1"), shape, str(tmp_path))
    eight = engine_arguments(settings("gpu_8"), shape, str(tmp_path))
    wide = engine_arguments(
        settings("gpu_8", "cluster.actor_gpus=2", "rollout.vllm.tensor_parallel=2"),
        shape,
        str(tmp_path),
    )
    cpu = engine_arguments(settings("bandit_vllm"), shape, str(tmp_path))
    assert one.weight_transfer_config.backend == "onpolicy_ipc" and one.enable_sleep_mode
    assert one.gpu_memory_utilization == 0.4 and one.kv_cache_memory_bytes == 14 * 2**30
    assert eight.weight_transfer_config.backend == "onpolicy_nccl" and not eight.enable_sleep_mode
    assert eight.gpu_memory_utilization == 0.85 and eight.kv_cache_memory_bytes is None
    assert (eight.tensor_parallel_size, wide.tensor_parallel_size) == (1, 2)
    for arguments in (one, eight, wide):
        assert arguments.enable_chunked_prefill and arguments.dtype == "bfloat16"
        assert arguments.distributed_executor_backend == "mp"
    assert cpu.weight_transfer_config.backend == "onpolicy_host"
    assert cpu.enable_chunked_prefill is False and cpu.tensor_parallel_size == 1
