"""A low-rank adapter on a network, through peft (Hu et al. 2021, arXiv 2106.09685).

    attach(network, config.learner.lora, seed, "learner.lora")    # nothing where there is no rank
    pieces(network)            # what leaves the learner: merged weights under their own names
    WithoutAdapter(network)    # π_ref, without a copy of the weights

peft puts a layer of its own in the place of each that gets an adapter. The network keeps its class,
so that nothing else here need know.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors import policy
from actors.low_rank import LowRank, Place
from actors.randomness import stream_key
from configs.bounds import any_of
from configs.errors import ConfigError
from configs.schema_lora import LoraConfig

ADAPTER = "default"  # peft's name of the only one


def targets(model: PreTrainedModel, lora: LoraConfig, section: str) -> list[str]:
    """Full names of the linear layers that get an adapter: of those beneath the output layer.

    section: of the settings. Raises ConfigError where a target is none of them.
    """
    body = {id(module) for module in model.base_model.modules()} - {
        id(model.get_output_embeddings())
    }
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in body
    ]  # fmt: skip
    wanted = lora.targets.split(",") if lora.targets else []
    for target in wanted:
        if not any(_is(name, target) for name in linear):
            own = sorted({name.rpartition(".")[2] for name in linear})
            key = f"{section}.targets"
            problem = f"{type(model).__name__} has no linear layer {target} under its output layer"
            raise ConfigError(key, lora.targets, problem, f"name some of {any_of(own)}")
    return [name for name in linear if not wanted or any(_is(name, t) for t in wanted)]


def check(shape: PretrainedConfig, lora: LoraConfig, section: str) -> None:
    """ConfigError where a causal language model of this architecture has no such targets."""
    if lora.rank:
        with torch.device("meta"):
            targets(AutoModelForCausalLM.from_config(shape), lora, section)


def attach(
    model: PreTrainedModel, lora: LoraConfig, seed: int, section: str, train_head: bool = False
) -> PreTrainedModel:
    """Freeze the network and put the adapter that the settings describe on it, by keyed draw.

    train_head: leave what is above the body, such as a reward model's head, to be trained whole.
    Returns the network.
    """
    if not lora.rank:
        return model
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=targets(model, lora, section),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that GPT-2's layers have their inputs first
        torch.manual_seed(stream_key(seed, "lora") >> 1)
        peft.inject_adapter_in_model(settings, model)
    for layer in _layers(model):
        for parameter in _adapter(layer):
            parameter.data = parameter.data.to(model.dtype)
    body = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        if train_head and id(parameter) not in body:
            parameter.requires_grad_(True)
    return model


@dataclass(frozen=True, eq=False)
class Piece:
    """A weight of the network without an adapter, and the layer of peft that adds to it, if any."""

    name: str  # that it has in a network without an adapter
    weight: nn.Parameter
    layer: Any = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that `whole` reads, to be gathered before."""
        return [self.weight, *(_adapter(self.layer) if self.layer is not None else [])]

    def whole(self) -> Tensor:
        """W + (alpha/rank)·B·A, in the weight's dtype; the weight itself without an adapter.

        Not peft's `get_delta_weight`, which in bfloat16 on a CPU takes the adapter's parameters out
        of the optimizer's memory.
        """
        if self.layer is None:
            return self.weight.detach()
        A_RI, B_OR = (parameter.detach().float() for parameter in _adapter(self.layer))
        delta_OI = (B_OR @ A_RI) * self.layer.scaling[ADAPTER]
        delta = delta_OI.T if self.layer.fan_in_fan_out else delta_OI
        return (self.weight.detach().float() + delta).to(self.weight.dtype)


def pieces(network: nn.Module) -> list[Piece]:
    """The network's weights in the order of `actors.policy.named`, adapters as part of theirs."""
    layers = _layers(network)
    of_weight = {id(layer.base_layer.weight): layer for layer in layers}
    added = {id(parameter) for layer in layers for parameter in _adapter(layer)}
    return [
        Piece(name.replace(".base_layer.", "."), parameter, of_weight.get(id(parameter)))
        for name, parameter in policy.named(network)
        if id(parameter) not in added
    ]


def low_rank(parts: Iterable[Piece], gather: Any, base: list[Any]) -> LowRank:
    """The adapter alone, of a network with one. gather: a context in which parameters are whole.

    base: a list with whatever gives the flat array without the adapter.
    """
    places, numbers, start = [], [], 0
    rank, scale = 0, 0.0
    for piece in parts:
        shape = tuple(getattr(piece.weight, "ds_shape", piece.weight.shape))
        if piece.layer is not None:
            places.append(Place(start, shape[0], shape[1], bool(piece.layer.fan_in_fan_out)))
            rank, scale = piece.layer.r[ADAPTER], piece.layer.scaling[ADAPTER]
            own = _adapter(piece.layer)
            with gather(own):
                numbers += [p.detach().float().cpu().numpy().ravel().copy() for p in own]
        start += math.prod(shape)
    return LowRank(base, places, rank, scale, np.concatenate(numbers))


class WithoutAdapter(nn.Module):
    """A network as it was before it got its adapter, in evaluation mode: π_ref."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers, training = _layers(self.module), self.module.training
        self.module.eval()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self.module(*args, **kwargs)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            self.module.train(training)

    def base(self) -> list[Tensor]:
        """Its weights, in the order of the flat array."""
        return [piece.weight for piece in pieces(self.module)]


def _layers(network: nn.Module) -> list[Any]:
    """peft's layers in the network."""
    return [module for module in network.modules() if hasattr(module, "lora_A")]


def _adapter(layer: Any) -> list[nn.Parameter]:
    """A, [rank, inputs], and B, [outputs, rank]."""
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
