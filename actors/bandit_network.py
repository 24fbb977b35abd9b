"""The bandit's network without transformers, whose import takes longer than many of its rounds.

GPT-2's parameters by transformers' names and in their order, so that its flat array is the one the
learner publishes; `actors.decoding` does the arithmetic. For those who sample and score: the
learner trains transformers' own network of the same architecture.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from actors.decoding import text_logits
from configs.schema import BanditPolicyConfig


class BanditNetwork(nn.Module):
    """GPT-nano (Appendix I), its numbers not set until weights are loaded."""

    def __init__(self, bandit: BanditPolicyConfig, positions: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="gpt2", vocab_size=bandit.vocabulary, n_positions=positions,
            hidden_size=bandit.width, num_hidden_layers=bandit.layers,
            num_attention_heads=bandit.heads, eos_token_id=None,
        )  # fmt: skip
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(bandit.vocabulary, bandit.width)
        self.transformer.wpe = nn.Embedding(positions, bandit.width)
        blocks = [_block(bandit.width, bandit.heads) for _ in range(bandit.layers)]
        self.transformer.h = nn.ModuleList(blocks)
        self.transformer.ln_f = nn.LayerNorm(bandit.width)

    def get_output_embeddings(self) -> Any:
        """The layer whose weight, [V, E], hidden states are multiplied by: tokens' own."""
        return self.transformer.wte

    def forward(self, token_NT: Tensor, **_: Any) -> SimpleNamespace:
        """`logits` after each token, [N, T, V], without a gradient, in transformers' form."""
        return SimpleNamespace(logits=text_logits(self, token_NT))


def _block(width: int, heads: int) -> nn.Module:
    """One layer: attention and MLP, each after its norm."""
    block = nn.Module()
    block.ln_1, block.attn = nn.LayerNorm(width), nn.Module()
    block.attn.c_attn, block.attn.c_proj = _affine(width, 3 * width), _affine(width, width)
    block.attn.scaling = (width // heads) ** -0.5
    block.ln_2, block.mlp = nn.LayerNorm(width), nn.Module()
    block.mlp.c_fc, block.mlp.c_proj = _affine(width, 4 * width), _affine(4 * width, width)
    block.mlp.act = nn.GELU(approximate="tanh")
    return block


def _affine(inputs: int, outputs: int) -> nn.Module:
    """transformers' Conv1D: x·W + b with W [inputs, outputs]."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(inputs, outputs))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer
