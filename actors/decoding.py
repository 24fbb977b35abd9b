"""From tokens to the logits of the next one, with a KV cache: a batch of responses as it grows.

transformers' own forward pass serves any network. For a token at a time its Python costs as much as
the arithmetic of a small network, so the two architectures used most (GPT-2 and GPT-NeoX, the
bandit's and Pythia's) are written out here, from the same weights and kernels: the logits were
equal to the bit where this was written. All let go of rows that have ended.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    DynamicCache,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)


class Decoding(Protocol):
    """One batch of N rows: what was fed so far is in its cache."""

    def logits(self, token_NP: Tensor, place_NP: Tensor) -> Tensor:
        """Feed P tokens a row, at these places of their texts; logits of the next, [N, V].

        P is the prompts' width at the first call, then 1.
        """

    def keep(self, row_R: Tensor) -> None:
        """Go on with these rows only, in this order."""


def start(model: PreTrainedModel, mask_NP: Tensor, tokens: int) -> Decoding:
    """For left-padded prompts and so many more tokens at most.

    mask_NP: 1 where the prompts are no padding.
    """
    if isinstance(model, GPT2LMHeadModel) and not model.config.add_cross_attention:
        return Gpt2(model, mask_NP, tokens)
    if isinstance(model, GPTNeoXForCausalLM) and _plain_rotary(model):
        return GptNeoX(model, mask_NP, tokens)
    return Transformers(model, mask_NP)


@torch.inference_mode()
def text_logits(model: PreTrainedModel, token_NT: Tensor) -> Tensor:
    """Logits after each token of whole texts, [N, T, V], by the network that decodes."""
    decoding = start(model, torch.ones_like(token_NT), 0)
    if isinstance(decoding, _Cached):
        return decoding.whole(token_NT)
    logits_NTV: Tensor = model(token_NT, use_cache=False).logits
    return logits_NTV


class Transformers:
    """Any causal language model of transformers."""

    def __init__(self, model: PreTrainedModel, mask_NP: Tensor) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.mask_NT = None if bool(mask_NP.all()) else mask_NP
        self.begun = False

    def logits(self, token_NP: Tensor, place_NP: Tensor) -> Tensor:
        if self.mask_NT is not None and self.begun:
            more_NP = torch.ones_like(token_NP)
            self.mask_NT = torch.cat([self.mask_NT, more_NP.to(self.mask_NT.dtype)], 1)
        self.begun = True
        out = self.model(
            token_NP, past_key_values=self.cache, use_cache=True, position_ids=place_NP,
            attention_mask=self.mask_NT, logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]

    def keep(self, row_R: Tensor) -> None:
        self.cache.batch_select_indices(row_R)
        if self.mask_NT is not None:
            self.mask_NT = self.mask_NT[row_R]


class _Cached(ABC):
    """Keys and values of all layers, [N, H, T, D] each, in memory that is taken once."""

    def __init__(self, model: PreTrainedModel, mask_NP: Tensor, tokens: int) -> None:
        shape, (rows, width) = model.config, mask_NP.shape
        heads, layers = shape.num_attention_heads, shape.num_hidden_layers
        size = (layers, 2, rows, heads, width + tokens, shape.hidden_size // heads)
        self.heads, self.seen = heads, 0
        self.cache = torch.empty(size, dtype=model.dtype, device=model.device)
        self.mask_NT: Tensor | None = None
        if not bool(mask_NP.all()):
            self.mask_NT = functional.pad(mask_NP.bool(), (0, tokens), value=True)
        self.output: Tensor = model.get_output_embeddings().weight

    def keep(self, row_R: Tensor) -> None:
        self.cache = self.cache[:, :, row_R]
        if self.mask_NT is not None:
            self.mask_NT = self.mask_NT[row_R]

    def logits(self, token_NP: Tensor, place_NP: Tensor) -> Tensor:
        width = token_NP.shape[1]
        assert width == 1 or not self.seen, "a prompt comes first, then a token at a time"
        allowed = self._allowed(width)
        hidden_NPE = self._hidden(token_NP, place_NP, allowed)
        self.seen += width
        return functional.linear(hidden_NPE[:, -1:], self.output)[:, -1]

    def whole(self, token_NT: Tensor) -> Tensor:
        """Logits after each token of texts without padding, [N, T, V]; instead of `logits`."""
        place_NT = torch.arange(token_NT.shape[1], device=token_NT.device).expand_as(token_NT)
        return functional.linear(self._hidden(token_NT, place_NT, None), self.output)

    @abstractmethod
    def _hidden(self, token_NP: Tensor, place_NP: Tensor, allowed: Tensor | None) -> Tensor:
        """The network's last hidden states of these tokens, [N, P, E]."""

    def _allowed(self, width: int) -> Tensor | None:
        """What each of the tokens fed attends to, [N, 1, width, T]; None: all that stands before.

        Padding attends to itself, so that it has numbers; nothing else attends to it.
        """
        if self.mask_NT is None:
            return None
        until = self.seen + width
        key_N11T = self.mask_NT[:, None, None, :until]
        if width == 1:
            return key_N11T
        own_PT = torch.ones(width, until, dtype=torch.bool, device=key_N11T.device)
        causal_PT = own_PT.tril(self.seen)
        return (key_N11T & causal_PT) | (causal_PT & own_PT.triu(self.seen))

    def _attend(
        self, layer: int, q_NHPD: Tensor, k_NHPD: Tensor, v_NHPD: Tensor,
        allowed: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention over the cache and these tokens, which join it, [N, P, E]."""
        rows, _, width, _ = q_NHPD.shape
        until = self.seen + width
        key_NHTD, value_NHTD = self.cache[layer, :, :, :, :until]
        key_NHTD[:, :, self.seen :], value_NHTD[:, :, self.seen :] = k_NHPD, v_NHPD
        out_NHPD = functional.scaled_dot_product_attention(
            q_NHPD, key_NHTD, value_NHTD, attn_mask=allowed,
            is_causal=allowed is None and width > 1, scale=scale,
        )  # fmt: skip
        return out_NHPD.transpose(1, 2).reshape(rows, width, -1)


class Gpt2(_Cached):
    """GPT-2: learned positions, one residual after the other."""

    def __init__(self, model: GPT2LMHeadModel, mask_NP: Tensor, tokens: int) -> None:
        super().__init__(model, mask_NP, tokens)
        self.network: Any = model.transformer

    def _hidden(self, token_NP: Tensor, place_NP: Tensor, allowed: Tensor | None) -> Tensor:
        net = self.network
        split = (*token_NP.shape, 3, self.heads, -1)
        x_NPE = functional.embedding(token_NP, net.wte.weight)
        x_NPE = x_NPE + functional.embedding(place_NP, net.wpe.weight)
        for number, block in enumerate(net.h):
            attention, mlp = block.attn, block.mlp
            qkv = _conv1d(_norm(x_NPE, block.ln_1), attention.c_attn).view(split)
            q_NHPD, k_NHPD, v_NHPD = (qkv[:, :, part].transpose(1, 2) for part in range(3))
            seen_NPE = self._attend(number, q_NHPD, k_NHPD, v_NHPD, allowed, attention.scaling)
            x_NPE = _conv1d(seen_NPE, attention.c_proj).add_(x_NPE)
            inner = mlp.act(_conv1d(_norm(x_NPE, block.ln_2), mlp.c_fc))
            x_NPE = _conv1d(inner, mlp.c_proj).add_(x_NPE)
        return _norm(x_NPE, net.ln_f)


class GptNeoX(_Cached):
    """GPT-NeoX: rotary positions on a part of each head; MLP beside attention, or after it."""

    def __init__(self, model: GPTNeoXForCausalLM, mask_NP: Tensor, tokens: int) -> None:
        super().__init__(model, mask_NP, tokens)
        self.network: Any = model.gpt_neox
        place_1T = torch.arange(mask_NP.shape[1] + tokens, device=model.device)[None]
        cos_1TD, sin_1TD = self.network.rotary_emb(self.output, place_1T)
        self.cos_TD, self.sin_TD = cos_1TD[0], sin_1TD[0]

    def _hidden(self, token_NP: Tensor, place_NP: Tensor, allowed: Tensor | None) -> Tensor:
        net = self.network
        split = (*token_NP.shape, self.heads, -1)
        turn = self.cos_TD[place_NP][:, None], self.sin_TD[place_NP][:, None]
        x_NPE = functional.embedding(token_NP, net.embed_in.weight)
        for number, layer in enumerate(net.layers):
            attention, mlp = layer.attention, layer.mlp
            qkv = _linear(_norm(x_NPE, layer.input_layernorm), attention.query_key_value)
            q_NHPD, k_NHPD, v_NHPD = qkv.view(split).transpose(1, 2).chunk(3, -1)
            q_NHPD, k_NHPD = _rotated(q_NHPD, *turn), _rotated(k_NHPD, *turn)
            seen_NPE = self._attend(number, q_NHPD, k_NHPD, v_NHPD, allowed, attention.scaling)
            seen_NPE = _linear(seen_NPE, attention.dense)
            beside = layer.use_parallel_residual
            before_NPE = x_NPE if beside else seen_NPE + x_NPE
            inner = mlp.act(
                _linear(_norm(before_NPE, layer.post_attention_layernorm), mlp.dense_h_to_4h)
            )
            out_NPE = _linear(inner, mlp.dense_4h_to_h)
            x_NPE = out_NPE + seen_NPE + x_NPE if beside else out_NPE + before_NPE
        return _norm(x_NPE, net.final_layer_norm)


def _plain_rotary(model: GPTNeoXForCausalLM) -> bool:
    """Whether positions alone say how to turn, and not the length of the text as well."""
    return model.gpt_neox.rotary_emb.rope_type in ("default", "linear")


def _rotated(x_NHPD: Tensor, cos_N1PR: Tensor, sin_N1PR: Tensor) -> Tensor:
    """The first R numbers of each head turned by its position (Su et al., arXiv 2104.09864)."""
    turned = cos_N1PR.shape[-1]
    x_NHPR, rest = x_NHPD[..., :turned], x_NHPD[..., turned:]
    half = torch.cat((-x_NHPR[..., turned // 2 :], x_NHPR[..., : turned // 2]), -1)
    return torch.cat((x_NHPR * cos_N1PR + half * sin_N1PR, rest), -1)


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return functional.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def _conv1d(x_NPE: Tensor, layer: Any) -> Tensor:
    """transformers' Conv1D: a linear layer with its weight the other way round."""
    rows, width, inputs = x_NPE.shape
    flat = torch.addmm(layer.bias, x_NPE.reshape(-1, inputs), layer.weight)
    return flat.view(rows, width, -1)
