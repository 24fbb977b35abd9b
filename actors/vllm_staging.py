"""The next version of the weights, made ready beside the one that generates (vLLM on a CPU).

vLLM packs every linear layer's weights for oneDNN and frees the originals, so each version has to
be packed anew: most of what a change of weights costs. `Staging` notes once which pieces of the
flat array vLLM's own loader copies to which place. From then on it packs them in a thread of its
own, straight out of shared memory, while the engine goes on with the version before. `swap` then
exchanges pointers and copies what is not packed (embeddings, biases, norms).

It holds packed weights twice, and keeps what it frees for the next version: a page that is touched
for the first time costs several times what copying it does.

Source: vllm 0.32.0, model_executor/layers/utils.py (dispatch_cpu_unquantized_gemm) and
model_executor/model_loader/reload/meta.py.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

PLAIN = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
PRIMITIVES = 32  # kept for each layer, by number of rows; as vLLM has it
PACKERS = min(4, len(os.sched_getaffinity(0)))  # threads; more only wait for memory
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of glibc's mallopt


class CannotStage(Exception):
    """Weights that vLLM has to load in its own way."""


class Piece(NamedTuple):
    """A part of the flat array, and its place in a parameter's storage."""

    source: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @property
    def until(self) -> int:
        """How much of the flat array it needs."""
        steps = zip(self.source.shape, self.source.stride())
        return int(self.source.storage_offset()) + sum((n - 1) * stride for n, stride in steps) + 1

    def place(self, storage: Tensor) -> Tensor:
        """Where it belongs, in a tensor that has the storage."""
        return storage.as_strided(self.size, self.stride, self.offset)


class Packing(NamedTuple):
    """A layer that multiplies by oneDNN, and what its weight [out, in] is made of."""

    layer: Any
    weight: Tensor  # without memory where vLLM has freed it
    pieces: list[Piece]

    @torch.no_grad()
    def pack(self) -> Any:
        """A new oneDNN handler, with a copy of the weights as they are now in the flat array."""
        first = self.pieces[0]
        if len(self.pieces) == 1 and first.source.shape == self.weight.shape:
            return ops.create_onednn_mm(first.source.to(self.weight.dtype).t(), PRIMITIVES)
        whole = torch.empty_strided(
            self.weight.shape, self.weight.stride(), dtype=self.weight.dtype
        ).zero_()  # rows that pad a vocabulary stay 0
        for piece in self.pieces:
            piece.place(whole).copy_(piece.source)
        return ops.create_onednn_mm(whole.t(), PRIMITIVES)


class Staging:
    """The way of one model's weights from the flat array into the engine.

    load: has vLLM's loader copy the weights, views of `flat`, into the model. arrived: waits until
    so many numbers of `flat` are there. Raises CannotStage where the loader does more than copying
    them, or where a layer multiplies by something else.
    """

    def __init__(
        self, model: nn.Module, flat: Tensor, load: Callable[[], None],
        arrived: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.arrived, self.count = arrived, flat.numel()
        layers = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
        for layer in model.modules():
            if not isinstance(getattr(layer, "quant_method", None), PLAIN):
                raise CannotStage(f"{type(layer).__name__} is quantized")
        for layer in layers:
            handler(layer)
        with _originals(layers) as weights, _Copies(flat) as copies:
            load()
        self.packings = [
            Packing(layer, weight, copies.into(weight)) for layer, weight in zip(layers, weights)
        ]
        self.packings.sort(key=_until)
        plain = [p.data for p in model.parameters() if p.numel()]
        places = [(piece.place(p), piece.source) for p in plain for piece in copies.into(p)]
        self.live, self.sources = [place for place, _ in places], [source for _, source in places]
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self.packers = ThreadPoolExecutor(PACKERS, thread_name_prefix="packing")
        self.packed: Future[list[Any]] | None = None
        _keep_memory()

    def begin(self, then: Callable[[Any], None]) -> None:
        """Pack what comes into the flat array, beside the caller; `then` is called when that is
        done, whether it succeeded or not. The array has to stay as it is until `swap`."""
        self.packed = self.thread.submit(self._pack)
        self.packed.add_done_callback(then)

    def _pack(self) -> list[Any]:
        return list(self.packers.map(self._packed_when_there, self.packings))

    def _packed_when_there(self, packing: Packing) -> Any:
        self.arrived(_until(packing))
        return packing.pack()

    @torch.no_grad()
    def swap(self) -> None:
        """Give the engine what is packed, once it is, and the rest. Nothing may be generated."""
        assert self.packed is not None, "nothing has begun"
        fresh, self.packed = self.packed.result(), None
        for packing, new in zip(self.packings, fresh):
            old = handler(packing.layer)
            old.handler_tensor, new.handler_tensor = new.handler_tensor, old.handler_tensor
        self.arrived(self.count)
        torch._foreach_copy_(self.live, self.sources)


def _until(packing: Packing) -> int:
    return max(piece.until for piece in packing.pieces)


def handler(layer: Any) -> Any:
    """The oneDNN handler that the layer multiplies by; CannotStage where it has none."""
    code, cells = (getattr(layer.cpu_linear, f"__{name}__", None) for name in ("code", "closure"))
    held = dict(zip(code.co_freevars, cells)) if code and cells else {}
    if "handler" not in held:
        raise CannotStage(f"{type(layer).__name__} multiplies by {layer.cpu_linear}")
    return held["handler"].cell_contents


@contextlib.contextmanager
def _originals(layers: list[Any]) -> Iterator[list[Tensor]]:
    """The layers' weights, for the block with those that vLLM has freed put back, as they were but
    without memory, so that its loader has somewhere to copy to."""
    freed = [(layer, layer.weight) for layer in layers if not layer.weight.numel()]
    for layer, _ in freed:
        kept = to_meta_tensor(get_layerwise_info(layer).restore_metadata[0]["weight"])
        layer._parameters["weight"] = restore_layer_refs(kept, layer)
    try:
        yield [layer.weight for layer in layers]
    finally:
        for layer, empty in freed:
            layer._parameters["weight"] = empty


class _Copies(TorchDispatchMode):
    """Notes every copy made in the block; CannotStage for one from elsewhere than `flat`."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self.origin = flat.untyped_storage().data_ptr()
        self.made: dict[int, list[Piece]] = {}  # by the storage that it goes to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            into, source = args[:2]
            if source.is_meta or source.untyped_storage().data_ptr() != self.origin:
                raise CannotStage("its loader computes weights")
            piece = Piece(source, into.shape, into.stride(), into.storage_offset())
            self.made.setdefault(into.untyped_storage()._cdata, []).append(piece)
        return func(*args, **(kwargs or {}))

    def into(self, parameter: Tensor) -> list[Piece]:
        """The pieces of a parameter, which has a storage of its own."""
        pieces = self.made.get(parameter.untyped_storage()._cdata, [])
        if not pieces or parameter.storage_offset():
            raise CannotStage("a parameter is not loaded")
        return pieces


def _keep_memory() -> None:
    """Have this process keep the memory that it frees, with its pages: glibc would hand large
    blocks back to the system and fault every page in again at the next version."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for setting, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(setting, value)
