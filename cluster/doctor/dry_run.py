"""`python -m cluster train PRESET --dry-run`: every setting resolved, and what a GPU would hold.

Nothing is loaded but architectures. The estimate is arithmetic, for each process and GPU:

learner rank   weights and gradients in the learner's precision, Adam's two moments and, in
               bfloat16, float32 master weights; ZeRO (Rajbhandari et al. 2020) shards the optimizer
               over ranks from stage 1, gradients from 2, weights at 3; π_ref whole; activations of
               one micro-batch: 17 numbers per token, layer and width (Korthikanti et al. 2022,
               without the attention matrix), or one with gradient checkpointing, and a layer in
               full; logits and their gradient in float32
rollout actor  weights; the KV cache is what `gpu_memory_utilization` leaves, or `kv_cache_gib`
evaluator      weights and its KV cache
reward model   weights, and activations of `reward.batch_tokens` in one layer

Not in it: CUDA's own gigabyte, fragmentation, NCCL's buffers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from actors import policy
from cluster.doctor import known_shapes
from cluster.stages.pipeline import directories, named
from configs.choices import DataSource, EngineKind, Precision, RewardKind
from configs.load import to_yaml
from configs.schema import Config

GIB = 2**30
WIDTH = {Precision.float32: 4, Precision.bfloat16: 2}  # bytes of a number
FULL, KEPT = (
    17,
    1,
)  # numbers per token, layer and width: all activations, and a checkpointed layer's
ADAM = 8  # bytes a parameter, two moments in float32
MOST, MISFIT = 0.95, "DOES NOT FIT into"  # share of a GPU that may be planned for


class Network(NamedTuple):
    """What memory depends on."""

    parameters: int
    layers: int
    width: int
    vocabulary: int
    cached: int  # numbers of the KV cache per token


class Role(NamedTuple):
    """One kind of process. parts: what it holds on its GPU (or one of its GPUs), bytes; share: of
    the GPU that it gets; note: what else is to be known."""

    name: str
    processes: int
    gpus: float
    parts: dict[str, float]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def network(shape: PretrainedConfig) -> Network:
    """Sizes of an architecture; its parameters counted without making them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    heads = shape.num_attention_heads
    kept = getattr(shape, "num_key_value_heads", None) or heads
    head = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    parameters = sum(p.numel() for p in model.parameters())
    layers, width = shape.num_hidden_layers, shape.hidden_size
    return Network(parameters, layers, width, shape.vocab_size, 2 * layers * kept * head)


def roles(config: Config) -> list[Role]:
    """Every kind of process with a GPU, or all of them where none has one."""
    policy_ = network(_shape(config, "policy.path"))
    found = [_learner(config, policy_), _evaluator(config, policy_)]
    if config.data.source is not DataSource.offline:
        found.insert(1, _actor(config, policy_))
    if config.reward.kind is RewardKind.model:
        found.append(_reward(config, network(_shape(config, "reward.path"))))
    with_gpus = [role for role in found if role.gpus]
    return with_gpus or found


def _shape(config: Config, key: str) -> PretrainedConfig:
    """The architecture behind a setting that may be the output of a stage not run yet."""
    origin = {"policy.path": "sft", "reward.path": "reward_model"}[key]
    section, stage = getattr(config, key.split(".")[0]), getattr(config, origin)
    path, revision = section.path, section.revision
    if key == "policy.path" and not path:
        return policy.architecture(config)
    directory = directories(config)[origin]
    if directory and path.startswith(str(directory)) and not (directory / "hf").is_dir():
        path, revision = stage.model, stage.revision
        if key == "reward.path" and (not path or path == config.policy.path):
            return _shape(config, "policy.path")
    return known_shapes.shape(key, path, revision)


def _learner(config: Config, net: Network) -> Role:
    learner, ranks, width = config.learner, config.learner.ranks, WIDTH[config.learner.precision]
    by_stage = [ranks if learner.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    master = 4 if learner.precision is Precision.bfloat16 else 0
    tokens = learner.micro_batch * _longest(config)
    if learner.micro_tokens:
        tokens = min(tokens, learner.micro_tokens)
    predicted = min(tokens, learner.micro_batch * config.rollout.max_tokens)
    full = FULL * tokens * net.width * width
    kept = KEPT * tokens * net.width * width * net.layers
    parts = {
        "weights": net.parameters * width / by_stage[2],
        "gradients": net.parameters * width / by_stage[1],
        "optimizer": net.parameters * (ADAM + master) / by_stage[0],
        "π_ref": float(net.parameters * width),
        "activations": kept + full if learner.gradient_checkpointing else full * net.layers,
        "logits": 8.0 * predicted * net.vocabulary,
    }
    note = f"{tokens:,} tokens a micro-batch, ZeRO-{learner.zero_stage} over {ranks}"
    return Role("learner rank", ranks, config.cluster.learner_gpus, parts, note)


def _actor(config: Config, net: Network) -> Role:
    vllm, width = config.rollout.vllm, WIDTH[config.learner.precision]
    parts = {"weights": net.parameters * width / vllm.tensor_parallel}
    per_token = net.cached * width / vllm.tensor_parallel
    if config.rollout.engine is EngineKind.vllm:
        room = vllm.gpu_memory_utilization * config.cluster.gpu_gib * GIB - parts["weights"]
        cache = vllm.kv_cache_gib * GIB or max(0.0, room)
    else:
        cache = per_token * _longest(config) * config.rollout.lease
        cache *= config.rollout.responses_per_prompt
    parts["KV cache"] = cache
    note = f"{math.floor(cache / per_token / _longest(config)):,} sequences of {_longest(config):,}"
    return Role("rollout actor", config.rollout.actors, config.cluster.actor_gpus, parts, note)


def _evaluator(config: Config, net: Network) -> Role:
    width = WIDTH[config.learner.precision]
    cache = net.cached * width * _longest(config) * config.eval.samples
    parts = {"weights": float(net.parameters * width), "KV cache": float(cache)}
    return Role("evaluator", 1, config.cluster.evaluator_gpus, parts)


def _reward(config: Config, net: Network) -> Role:
    width = WIDTH[config.reward.precision]
    full = FULL * config.reward.batch_tokens * net.width * width
    parts = {"weights": float(net.parameters * width), "activations": float(full)}
    return Role("reward model", config.reward.replicas, config.cluster.reward_gpus, parts)


def _longest(config: Config) -> int:
    """Tokens of a prompt and its response, at most."""
    if not config.policy.path:
        return 1 + config.rollout.max_tokens
    shape = _shape(config, "policy.path")
    return policy.context(config, shape)


def lines(config: Config) -> Iterator[str]:
    """The estimate for people: a line for each kind of process, and one for what takes turns."""
    found = roles(config)
    for role in found:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in role.parts.items())
        where = f"{role.gpus:g} GPU" if role.gpus else "CPU"
        yield f"{role.processes} × {role.name} ({where}): {role.total / GIB:.1f} GiB = {parts}"
        told = [_verdict(role.total, role.gpus, config), role.note]
        if any(told):
            yield "    " + "; ".join(filter(None, told))
    if config.cluster.colocated:
        turns, rest = found[:2], found[2:]
        held = max(role.total for role in turns) + sum(role.total for role in rest)
        yield f"in turns on one GPU: {held / GIB:.1f} GiB"
        yield f"    {_verdict(held, 1.0, config)}"


def _verdict(held: float, gpus: float, config: Config) -> str:
    """Whether so many bytes fit into a share of a GPU, or its whole."""
    if not gpus:
        return ""
    room = config.cluster.gpu_gib * (1.0 if config.cluster.colocated else min(1.0, gpus))
    return f"of {room:g} GiB" if held < MOST * room * GIB else f"{MISFIT} {room:g} GiB"


def dry_run(config: Config) -> int:
    """Print settings and estimate; 0 where everything fits, 1 where not."""
    config = named(config)
    print(to_yaml(config))
    told = list(lines(config))
    print("\n".join(told))
    return int(any(MISFIT in line for line in told))
