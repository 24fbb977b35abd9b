"""From tokens to the logits of the next one, with a KV cache: a batch of responses as it grows.

transformers' own forward pass serves any network. For a token at a time its Python costs as much as
the arithmetic of a small network, so the two architectures used most (GPT-2 and GPT-NeoX, the
bandit's and Pythia's) are written out here, from the same weights and kernels: the logits were
equal to the bit where this was written. All let go of rows that have ended. Networks are told apart
by their classes' names: the bandit's actors do without transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

GPT2 = ("GPT2LMHeadModel", "BanditNetwork")


class Decoding(Protocol):
    """One batch of N rows: what was fed so far is in its cache."""

    def logits(self, token_NP: Tensor, place_NP: Tensor) -> Tensor:
        """Feed P tokens a row, at these places of their texts; logits of the next, [N, V].

        P is the prompts' width at the first call, then 1.
        """

    def keep(self, row_R: Tensor) -> None:
        """Go on with these rows only, in this order."""


def start(model: Any, mask_NP: Tensor, tokens: int) -> Decoding:
    """For left-padded prompts and so many more tokens at most.

    model: a causal language model of transformers, or an `actors.bandit_network`. mask_NP: 1 where
    the prompts are no padding.
    """
    kind = _written_out(model)
    return Transformers(model, mask_NP) if kind is None else kind(model, mask_NP, tokens)


@torch.inference_mode()
def text_logits(model: Any, token_NT: Tensor) -> Tensor:
    """Logits after each token of whole texts, [N, T, V], by the network that decodes.

    Texts start at the first column; what stands after a text's end does not matter to it.
    """
    kind = _written_out(model)
    if kind is not None:
        return kind(model, torch.ones_like(token_NT), 0).whole(token_NT)
    logits_NTV: Tensor = model(token_NT, use_cache=False).logits
    return logits_NTV


def _written_out(model: Any) -> "type[_Cached] | None":
    name = type(model).__name__
    if name in GPT2 and not getattr(model.config, "add_cross_attention", False):
        return Gpt2
    if name == "GPTNeoXForCausalLM" and _plain_rotary(model):
        return GptNeoX
    return None


class Transformers:
    """Any causal language model of transformers."""

    def __init__(self, model: Any, mask_NP: Tensor) -> None:
        from transformers import DynamicCache

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
    """Keys and values of all layers, [N, H, 2, T, D] each, in memory that is taken once."""

    def __init__(self, model: Any, mask_NP: Tensor, tokens: int) -> None:
        shape, (rows, width) = model.config, mask_NP.shape
        heads, layers = shape.num_attention_heads, shape.num_hidden_layers
        size = (layers, rows, heads, 2, width + tokens, shape.hidden_size // heads)
        self.heads, self.seen = heads, 0
        self.output: Tensor = model.get_output_embeddings().weight
        # Of whole texts nothing is kept.
        self.cache: Tensor | None = self.output.new_empty(size) if tokens else None
        self.mask_NT: Tensor | None = None
        if not bool(mask_NP.all()):
            self.mask_NT = functional.pad(mask_NP.bool(), (0, tokens), value=True)

    def keep(self, row_R: Tensor) -> None:
        self.cache = None if self.cache is None else self.cache[:, row_R]
        if self.mask_NT is not None:
            self.mask_NT = self.mask_NT[row_R]

    def logits(self, token_NP: Tensor, place_NP: Tensor) -> Tensor:
        width = token_NP.shape[1]
        assert width == 1 or not self.seen, "a prompt comes first, then a token at a time"
        allowed = self._allowed(width)
        hidden_NPE = self._hidden(token_NP, place_NP, allowed)
        self.seen += width
        return functional.linear(hidden_NPE[:, -1], self.output)

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
        self, layer: int, q_NHPD: Tensor, both_NH2PD: Tensor, allowed: Tensor | None, scale: float
    ) -> Tensor:
        """Attention over the cache, if there is one, and these tokens' keys and values, which join
        it, [N·P, E]."""
        rows, _, width, _ = q_NHPD.shape
        if self.cache is not None:
            cache_NH2TD = self.cache[layer, :, :, :, : self.seen + width]
            cache_NH2TD[:, :, :, self.seen :] = both_NH2PD
            both_NH2PD = cache_NH2TD
        out_NHPD = functional.scaled_dot_product_attention(
            q_NHPD, both_NH2PD[:, :, 0], both_NH2PD[:, :, 1], attn_mask=allowed,
            is_causal=allowed is None and width > 1, scale=scale,
        )  # fmt: skip
        return out_NHPD.transpose(1, 2).reshape(rows * width, -1)


class Gpt2(_Cached):
    """GPT-2: learned positions, one residual after the other."""

    def __init__(self, model: Any, mask_NP: Tensor, tokens: int) -> None:
        super().__init__(model, mask_NP, tokens)
        net = model.transformer
        self.token_VE, self.place_TE = net.wte.weight, net.wpe.weight
        self.last = _norm(net.ln_f)
        self.layers = [
            (
                _norm(block.ln_1), _conv1d(block.attn.c_attn), _conv1d(block.attn.c_proj),
                _norm(block.ln_2), _conv1d(block.mlp.c_fc), _conv1d(block.mlp.c_proj),
                block.mlp.act, block.attn.scaling,
            )
            for block in net.h
        ]  # fmt: skip

    def _hidden(self, token_NP: Tensor, place_NP: Tensor, allowed: Tensor | None) -> Tensor:
        split = (*token_NP.shape, 3, self.heads, -1)
        x_RE = functional.embedding(token_NP.flatten(), self.token_VE)
        x_RE = x_RE + functional.embedding(place_NP.flatten(), self.place_TE)
        for number, layer in enumerate(self.layers):
            norm, attention, dense, next_norm, widen, narrow, act, scale = layer
            qkv_NP3HD = attention(norm(x_RE)).view(split)
            q_NHPD = qkv_NP3HD[:, :, 0].transpose(1, 2)
            both_NH2PD = qkv_NP3HD[:, :, 1:].permute(0, 3, 2, 1, 4)
            x_RE = dense(self._attend(number, q_NHPD, both_NH2PD, allowed, scale)).add_(x_RE)
            x_RE = narrow(act(widen(next_norm(x_RE)))).add_(x_RE)
        return self.last(x_RE).view(*token_NP.shape, -1)


class GptNeoX(_Cached):
    """GPT-NeoX: rotary positions on a part of each head; MLP beside attention, or after it."""

    def __init__(self, model: Any, mask_NP: Tensor, tokens: int) -> None:
        super().__init__(model, mask_NP, tokens)
        net = model.gpt_neox
        self.token_VE = net.embed_in.weight
        place_1T = torch.arange(mask_NP.shape[1] + tokens, device=mask_NP.device)[None]
        cos_1TR, sin_1TR = net.rotary_emb(self.output, place_1T)
        self.cos_TR, self.sin_TR = cos_1TR[0], sin_1TR[0].clone()
        self.sin_TR[:, : self.sin_TR.shape[1] // 2].neg_()
        self.beside: bool = model.config.use_parallel_residual
        self.last = _norm(net.final_layer_norm)
        self.layers = [
            (
                _norm(block.input_layernorm), _linear(block.attention.query_key_value),
                _linear(block.attention.dense), _norm(block.post_attention_layernorm),
                _linear(block.mlp.dense_h_to_4h), _linear(block.mlp.dense_4h_to_h),
                block.mlp.act, block.attention.scaling,
            )
            for block in net.layers
        ]  # fmt: skip

    def _hidden(self, token_NP: Tensor, place_NP: Tensor, allowed: Tensor | None) -> Tensor:
        split = (*token_NP.shape, self.heads, 3, -1)
        cos, sin = self.cos_TR[place_NP][:, :, None, None], self.sin_TR[place_NP][:, :, None, None]
        x_RE = functional.embedding(token_NP.flatten(), self.token_VE)
        for number, layer in enumerate(self.layers):
            norm, attention, dense, next_norm, widen, narrow, act, scale = layer
            qkv_NPH3D = attention(norm(x_RE)).view(split)
            _turn(qkv_NPH3D[:, :, :, :2, : cos.shape[-1]], cos, sin)
            q_NHPD = qkv_NPH3D[:, :, :, 0].transpose(1, 2)
            both_NH2PD = qkv_NPH3D[:, :, :, 1:].permute(0, 2, 3, 1, 4)
            seen_RE = dense(self._attend(number, q_NHPD, both_NH2PD, allowed, scale))
            before_RE = x_RE if self.beside else seen_RE + x_RE
            out_RE = narrow(act(widen(next_norm(before_RE))))
            x_RE = out_RE.add_(seen_RE).add_(x_RE) if self.beside else out_RE.add_(before_RE)
        return self.last(x_RE).view(*token_NP.shape, -1)


def _plain_rotary(model: Any) -> bool:
    """Whether positions alone say how to turn, and not the length of the text as well."""
    return model.gpt_neox.rotary_emb.rope_type in ("default", "linear")


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn queries and keys by their positions, in place (Su et al., arXiv 2104.09864).

    x: [N, P, H, 2, R], the numbers of each head that turn. cos, sin: [N, P, 1, 1, R], sin of the
    first half negative.
    """
    x.copy_(x * cos + x.roll(x.shape[-1] // 2, -1) * sin)


def _norm(layer: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, eps = layer.normalized_shape, layer.weight, layer.bias, layer.eps
    return lambda x: functional.layer_norm(x, shape, weight, bias, eps)


def _linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return _affine(layer.weight.t(), layer.bias)


def _conv1d(layer: Any) -> Callable[[Tensor], Tensor]:
    """transformers' Conv1D: a linear layer with its weight the other way round."""
    return _affine(layer.weight, layer.bias)


def _affine(weight_IO: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if bias is None:
        return lambda x: x.mm(weight_IO)
    return lambda x: torch.addmm(bias, x, weight_IO)
