"""The policy as a network: its architecture, its scores of a text, its weights as one flat array.

Actors build the architecture only; every set of weights, the first one too, reaches them from the
learner with its version. So π_ref and a value head never leave the learner. transformers is
imported where it is needed: those who only sample the bandit do without it.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.bandit_network import BanditNetwork
from configs.choices import Precision
from configs.schema import BanditPolicyConfig, Config, PolicyConfig

if TYPE_CHECKING:
    from transformers import GPT2Config, PretrainedConfig, PreTrainedModel

DTYPES = {Precision.float32: torch.float32, Precision.bfloat16: torch.bfloat16}


def architecture(config: Config) -> PretrainedConfig:
    """The policy's transformers configuration, from its directory or for the bandit.

    Raises ValueError in one line where `policy.path` cannot be read.
    """
    policy = config.policy
    if not policy.path:
        return bandit_architecture(policy.bandit, config.rollout.max_tokens)
    from transformers import AutoConfig

    try:
        pinned(policy)
        return AutoConfig.from_pretrained(
            policy.path, revision=policy.revision or None, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"policy.path={policy.path}: cannot be read: {line}") from error


def pinned(policy: PolicyConfig) -> None:
    """ValueError for a hub name without a commit: it stands for whatever its owner puts there."""
    if not os.path.isdir(policy.path) and not policy.revision:
        raise ValueError(
            "no such directory; correct it, or pin a hub name with policy.revision=COMMIT"
        )


def bandit_architecture(bandit: BanditPolicyConfig, max_tokens: int) -> GPT2Config:
    """GPT-nano (Appendix I): 3 layers, 3 heads, width 48, no dropout, no end token."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=bandit.vocabulary,
        n_positions=bandit_positions(max_tokens),
        n_embd=bandit.width,
        n_layer=bandit.layers,
        n_head=bandit.heads,
        resid_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel instead of seven
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=True,
    )


def bandit_positions(max_tokens: int) -> int:
    """The bandit's context, in tokens: its one-token prompt and a response."""
    return max(16, max_tokens + 1)


def to_sample(config: Config) -> Any:
    """The policy's network for those who load weights and sample: of transformers, or the bandit's
    own, which has the same parameters and logits."""
    if config.policy.path:
        return build(architecture(config), config.learner.precision).eval()
    network = BanditNetwork(config.policy.bandit, bandit_positions(config.rollout.max_tokens))
    return network.to(DTYPES[config.learner.precision]).eval()


def build(shape: PretrainedConfig, precision: Precision = Precision.float32) -> PreTrainedModel:
    """A network of this architecture, its weights drawn at random."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(shape, dtype=DTYPES[precision])


def load_pretrained(policy: PolicyConfig, path: str, precision: Precision) -> PreTrainedModel:
    """The network with the weights of a model directory (safetensors only, no remote code)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path,
        revision=policy.revision or None,
        dtype=DTYPES[precision],
        use_safetensors=True,
        trust_remote_code=False,
    )


def end_tokens(shape: PretrainedConfig) -> tuple[int, ...]:
    """Token ids that end a response; none for the bandit."""
    end = shape.eos_token_id
    if end is None:
        return ()
    return tuple(end) if isinstance(end, list | tuple) else (int(end),)


def context_limit(shape: PretrainedConfig) -> int:
    """The longest prompt and response together, in tokens."""
    return int(getattr(shape, "max_position_embeddings", None) or shape.n_positions)


def context(config: Config, shape: PretrainedConfig) -> int:
    """Prompt and response together, at most, in tokens, as the settings have it."""
    limit = context_limit(shape)
    longest = config.prompts.max_tokens
    return min(limit, longest + config.rollout.max_tokens) if longest else limit


def layout(shape: PretrainedConfig) -> tuple[list[str], list[list[int]]]:
    """Names and shapes of the flat array's pieces, without making the network."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        named = list(AutoModelForCausalLM.from_config(shape).named_parameters())
    return [name for name, _ in named], [list(p.shape) for _, p in named]


def write_architecture(shape: PretrainedConfig, directory: str) -> None:
    """Write config.json, with the name of the network's class in it."""
    from transformers import AutoModelForCausalLM

    named = copy.deepcopy(shape)
    if not named.architectures:
        with torch.device("meta"):
            named.architectures = [type(AutoModelForCausalLM.from_config(shape)).__name__]
    named.save_pretrained(directory)


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters in their fixed order, tied ones once: the layout of the flat array."""
    return model.named_parameters()


def parameters(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of `named`."""
    return (parameter for _, parameter in named(model))


@torch.no_grad()
def flatten(model: nn.Module | Sequence[Tensor], into: np.ndarray | None = None) -> np.ndarray:
    """All weights as one float32 array, [number of parameters], a fresh one where none is given.

    model: a network, or its parameters in their order. into: to be filled; a copy into memory that
    was used before is several times faster.
    """
    sources = parameters(model) if isinstance(model, nn.Module) else model
    sources = [parameter.detach() for parameter in sources]
    sizes = [source.numel() for source in sources]
    flat = torch.empty(sum(sizes)) if into is None else torch.from_numpy(into)
    pieces = [piece.view(s.shape) for piece, s in zip(flat.split(sizes), sources)]
    torch._foreach_copy_(pieces, sources)
    return flat.numpy()


@torch.no_grad()
def unflatten(model: nn.Module, flat: np.ndarray) -> None:
    """Copy a flat array made by `flatten` into a model of the same architecture."""
    targets = list(parameters(model))
    expected = sum(p.numel() for p in targets)
    if flat.size != expected:
        raise ValueError(f"weights have {flat.size} numbers, this architecture {expected}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of arrays that cannot be written to
        pieces = torch.from_numpy(flat).split([p.numel() for p in targets])
    torch._foreach_copy_(targets, [piece.view(p.shape) for piece, p in zip(pieces, targets)])


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], text_NT: np.ndarray, device: Any) -> np.ndarray:
    """log π(token | those before it) of all tokens but the first, [N, T − 1] float32, nats.

    logits: from tokens [N, T] to logits of each one's next, [N, T, V].
    """
    token_NT = torch.tensor(text_NT, dtype=torch.long, device=device)
    logits_NLV = logits(token_NT)[:, :-1].float()
    logp_NL1 = logits_NLV.log_softmax(-1).gather(-1, token_NT[:, 1:, None])
    return logp_NL1[..., 0].cpu().numpy()
