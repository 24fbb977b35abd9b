"""Pushes over vLLM's own trainer-side classes: `nccl` to other GPUs, `ipc` within one.

vLLM's trainer engine drives the protocol: start on all actors, update while it broadcasts, finish.
It is given an inference client and a source of weights, and both are ours: the client calls the
actors' step `push` (`actors.vllm_push`) and gives each engine ranks of its own in the group; the
source hands on what `learner.transfer` feeds, so that a parameter is gathered once for all ways.
All or nothing: where one actor fails at a step, nobody takes the version.

Source: vllm 0.32.0, distributed/weight_transfer/{base,nccl_engine,nccl_common,ipc_engine}.py. The
device communication itself (NCCL, CUDA IPC) has not run: no GPU was there.
"""

import contextlib
import math
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.rollout import Version
from configs.schema import Config
from configs.schema_vllm import Transfer
from learner.transfer import Link

BUFFER_BYTES = 2**28  # of parameters that travel together; vLLM keeps two on either side for nccl

# (actors by index, step, payload of each) → why a step failed, by index; as soon as one fails
Ask = Callable[[Mapping[int, Any], str, Mapping[int, dict[str, Any]]], dict[int, str]]


class Meta(NamedTuple):
    """vLLM's ParamMeta."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PushFailed(RuntimeError):
    """An actor did not take a step; names it and says why."""


class FedSource:
    """vLLM's WeightSource: declares the whole model, yields what it is fed for one send."""

    def __init__(self, layout: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self._metadata = [Meta(*entry) for entry in layout]
        self.weights: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[Meta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return max(math.prod(m.shape) * m.dtype.itemsize for m in self._metadata)


class ActorsClient:
    """vLLM's VLLMWeightSyncClient over rollout actors. ranks: GPUs of each engine."""

    def __init__(self, actors: Mapping[int, Any], ranks: int, ask: Ask) -> None:
        self.actors = dict(sorted(actors.items()))
        self.ranks = ranks
        self.ask = ask
        self.version = Version(-1, -1)  # of the send under way
        self.end_link: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Engines know nothing of each other: each is told where its ranks begin."""
        payloads = {actor: dict(init_info) for actor in self.actors}
        for place, payload in enumerate(payloads.values()):
            if "rank_offset" in payload:
                payload["rank_offset"] += place * self.ranks
        self._step("init", payloads)

    def start_weight_update(self) -> None:
        self._all("start", {})

    def update_weights(self, update_info: Any) -> None:
        """Returns once all have loaded the chunk. A failure ends the link, or the learner would go
        on broadcasting to somebody who is not there."""
        payload: dict[str, Any] = {"push": dict(update_info)}
        if (handles := payload["push"].pop("ipc_handles", None)) is not None:
            payload["handles"] = pickle.dumps(handles)
        payload["push"].pop("ipc_handles_pickled", None)
        try:
            self._all("update", payload)
        except PushFailed:
            self.end_link()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish", {"version": tuple(self.version)})

    def abandon(self) -> None:
        """Tell whoever listens that the version will not come."""
        with contextlib.suppress(Exception):
            self._all("abandon", {})

    def _all(self, name: str, payload: dict[str, Any]) -> None:
        self._step(name, dict.fromkeys(self.actors, payload))

    def _step(self, name: str, payloads: Mapping[int, dict[str, Any]]) -> None:
        if failed := self.ask(self.actors, name, payloads):
            actor, why = min(failed.items())
            raise PushFailed(f"rollout actor {actor} at {name}: {why}")


class VllmLink:
    """`learner.transfer.Link` over one vLLM trainer engine."""

    def __init__(self, trainer: Any, client: ActorsClient, source: FedSource) -> None:
        self.trainer, self.client, self.source = trainer, client, source
        client.end_link = trainer.shutdown

    def send(self, version: Version, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.client.version, self.source.weights = version, weights
        self.trainer.send_weights()

    def abandon(self) -> None:
        self.trainer.shutdown()  # NCCL: abort, so that a broadcast that waits comes back
        self.client.abandon()


class VllmTransport:
    """`learner.transfer.Transport`. ask: calls the actors; address: of this process, for NCCL."""

    def __init__(
        self, config: Config, layout: list[tuple[str, torch.dtype, tuple[int, ...]]], ask: Ask,
        address: str,
    ) -> None:  # fmt: skip
        self.config, self.layout, self.ask, self.address = config, layout, ask, address

    def present(self, actors: Mapping[int, Any]) -> set[int]:
        nothing: dict[str, Any] = {}
        failed = self.ask(actors, "ready", dict.fromkeys(actors, nothing)) if actors else {}
        return set(actors) - set(failed)

    def connect(self, epoch: int, actors: Mapping[int, Any]) -> Link:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        source = FedSource(self.layout)
        ranks = self.config.rollout.vllm.tensor_parallel
        client = ActorsClient(actors, ranks, self.ask)
        info = self._init_info(1 + ranks * len(actors), max(BUFFER_BYTES, source.largest))
        trainer: Any = WeightTransferTrainerFactory.trainer_init(
            info,
            client=client,
            source=source,  # type: ignore[arg-type]
        )
        return VllmLink(trainer, client, source)

    def _init_info(self, world: int, buffer: int) -> Any:
        """world: the learner's rank 0, and each GPU of each engine. buffer: bytes."""
        if self.config.rollout.transfer is Transfer.ipc:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=buffer, rank=0)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            self.address, free_port(), world, packed=True, packed_buffer_size_bytes=buffer, rank=0
        )


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
