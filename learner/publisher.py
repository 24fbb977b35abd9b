"""How a version's weights leave the learner: the host path, always, and a push beside it.

The host path is one flat float32 array: in Ray's object store, and its reference goes to the queue
with the version; a small one goes there itself. An actor that leases takes it where its engine has
another version. A push (`rollout.transfer=nccl|ipc`) gives the version to the actors' GPUs before
the queue knows of it, so that at their next lease there is nothing to fetch. The array is made all
the same: for the evaluator, and for an actor that the push did not reach. Both ways share one pass
of gathering, one parameter at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import ray
import torch

from actors.rollout import Version
from configs.schema import Config
from configs.schema_vllm import Transfer
from learner.learner import Learner
from learner.transfer import Sending, TransferGroup
from learner.vllm_push import VllmTransport

PING_SECONDS = 0.5
SMALL_BYTES = 2**20  # of weights up to which the queue has them, and not a reference


class Publisher(Protocol):
    """The learner's side of the weights' way to actors. Every rank calls it at the same moments."""

    def publish(self, push: bool) -> Any:
        """The current weights for the queue, from rank 0; None from others.

        push: whether actors are to have them; else they are for the evaluator only.
        """

    def initial(self) -> Any:
        """π_ref's weights, from rank 0; None from others. The same at every call."""

    def join(self, actor: int, handle: Any) -> None:
        """A rollout actor's process, new or restarted; on rank 0, from any thread."""


class HostPublisher:
    """The queue, or Ray's object store. put: from the array to what the queue hands out."""

    def __init__(
        self, config: Config, learner: Learner, rank: int, put: Callable[[Any], Any]
    ) -> None:
        self.learner, self.rank, self.put = learner, rank, put
        self._initial: Any = None
        self.shares_gpu = config.cluster.colocated

    def publish(self, push: bool) -> Any:
        if self.shares_gpu and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the actor's turn is next, and it counts on the memory
        flat = self._weights(push)
        return self.put(flat) if self.rank == 0 else None

    def _weights(self, push: bool) -> np.ndarray:
        return self.learner.weights()

    def initial(self) -> Any:
        if self._initial is None and self.rank == 0:
            self._initial = self.put(self.learner.reference.weights())
        return self._initial

    def join(self, actor: int, handle: Any) -> None:
        """Actors come for their weights."""


class AdapterPublisher(HostPublisher):
    """Ray's object store, with π_ref's weights once and of each version the adapter alone
    (`actors.low_rank`), to be merged by whoever fetches it."""

    def _weights(self, push: bool) -> Any:
        if self.learner.conditionals is not None:
            self.learner.weights()  # kept for measuring KL
        return self.learner.engine.low_rank([self.initial()])


class PushPublisher(HostPublisher):
    """A push to a group of actors beside it, from rank 0."""

    def __init__(
        self, config: Config, learner: Learner, rank: int, put: Callable[[Any], Any],
        group: TransferGroup,
    ) -> None:  # fmt: skip
        super().__init__(config, learner, rank, put)
        self.group = group
        self.pushed: Version | None = None

    def _weights(self, push: bool) -> np.ndarray:
        sending: Sending | None = None
        version = self.learner.version
        if push and self.rank == 0 and version != self.pushed:  # a skipped step makes none
            sending = self.group.begin(version)
        flat = self.learner.weights(sending.feed if sending else None)
        if sending is not None and sending.end():
            self.pushed = version
        return flat

    def join(self, actor: int, handle: Any) -> None:
        self.group.join(actor, handle)


def publisher(config: Config, learner: Learner, rank: int) -> Publisher:
    """The publisher that `rollout.transfer` asks for."""
    if config.rollout.transfer is Transfer.host:
        kind = AdapterPublisher if config.rollout.adapter_only else HostPublisher
        put = ray.put if config.rollout.adapter_only else _put
        return kind(config, learner, rank, put)
    layout, here = learner.engine.layout(), ray.util.get_node_ip_address()
    transport = VllmTransport(config, layout, ask_over_ray(config), here)
    group = TransferGroup(transport, config.limits.transfer_seconds)
    return PushPublisher(config, learner, rank, ray.put, group)


def _put(flat: np.ndarray) -> Any:
    return flat.copy() if flat.nbytes <= SMALL_BYTES else ray.put(flat)


def ask_over_ray(config: Config) -> Callable[..., dict[int, str]]:
    """`learner.vllm_push.Ask` for Ray handles of `cluster.rollout_worker.RolloutWorker`."""

    def ask(
        actors: Mapping[int, Any], step: str, payloads: Mapping[int, dict[str, Any]]
    ) -> dict[int, str]:
        if step == "ready":
            calls = {handle.call.remote("ready"): i for i, handle in actors.items()}
            return _failed(calls, PING_SECONDS, first=False)
        calls = {h.call.remote("push", step, payloads[i]): i for i, h in actors.items()}
        return _failed(calls, config.limits.transfer_seconds, first=True)

    return ask


def _failed(calls: dict[Any, int], seconds: float, first: bool) -> dict[int, str]:
    """Why calls failed or are late, by actor. first: back at the first failure."""
    failed: dict[int, str] = {}
    waiting = list(calls)
    while waiting and not (failed and first):
        done, waiting = ray.wait(waiting, num_returns=1, timeout=seconds)
        if not done:
            failed |= {calls[call]: f"no answer in {seconds:g} s" for call in waiting}
            break
        try:
            ray.get(done[0])
        except ray.exceptions.RayError as error:
            lines = str(getattr(error, "cause", None) or error).strip().splitlines()
            failed[calls[done[0]]] = lines[-1] if lines else type(error).__name__
    return failed
