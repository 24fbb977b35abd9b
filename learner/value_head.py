"""A scalar head V(prefix) beside the policy, trained with it and never published.

DeepSpeed owns policy and head as one module, so that steps, ZeRO and checkpoints cover both; what
leaves the learner is read from `policy_of`.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from configs.schema_value import ValueConfig


@dataclass
class PolicyAndValue(ModelOutput):
    """What a network with a value head returns."""

    logits: Tensor | None = None  # [N, T, V]
    value: Tensor | None = None  # [N, T, 1] float32: of the prefix that ends with each token


class WithValueHead(nn.Module):
    """A causal language model whose last hidden state (after the final norm) feeds a linear head.

    The head starts at 0, the same on all ranks. Takes what the model takes.
    """

    def __init__(self, policy: PreTrainedModel, settings: ValueConfig) -> None:
        super().__init__()
        self.policy = policy
        self.detached = settings.detached
        width = policy.config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1, dtype=policy.dtype, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def get_output_embeddings(self) -> nn.Module:
        """The policy's output layer, as transformers' models have it."""
        return self.policy.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> PolicyAndValue:
        out = self.policy(*args, output_hidden_states=True, **kwargs)
        hidden_NTD = out.hidden_states[-1]
        if self.detached:
            hidden_NTD = hidden_NTD.detach()
        return PolicyAndValue(out.logits, self.value_head(hidden_NTD).float())


def policy_of(network: PreTrainedModel | WithValueHead) -> PreTrainedModel:
    """The policy of a network with or without a value head."""
    return network.policy if isinstance(network, WithValueHead) else network


def weightless(outputs: Any) -> Tensor:
    """0, depending on every parameter: the loss of a micro-batch that fills up."""
    zero = outputs.logits.sum() * 0.0
    return zero if outputs.get("value") is None else zero + outputs.value.sum() * 0.0
