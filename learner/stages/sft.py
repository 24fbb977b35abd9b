"""Supervised fine-tuning: the likelihood of responses, the end token included.

A row has `prompt_ids` and `response_ids`, or text in the columns of a public data set, as
`actors.adapters` has it: a prompt or the conversation up to it, and one response. The end token is
appended to a response that has none. Nothing is learned about the prompt.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from actors import policy
from actors.tables import DataError, Row
from configs.schema import Config
from learner.stages.base import Stage
from learner.stages.source import pad_right


class Sft(Stage):
    """loss = − Σ log π(token | prefix) over the minibatch's response tokens, by their number."""

    kind = "sft"
    unit = "response_tokens"

    def __init__(self, config: Config) -> None:
        self._prompts: list[np.ndarray] = []
        self._responses: list[np.ndarray] = []
        self._ends: tuple[int, ...] = ()
        super().__init__(config)

    def take(self, row: Row) -> Sequence[np.ndarray]:
        self._ends = self._ends or self.source.end_tokens()
        prompt, response = self.source.prompt_and_response(row, self.settings.format)
        if not len(prompt):
            raise DataError(f"{row.where}: the prompt has no tokens")
        if not len(response) or response[-1] not in self._ends:
            response = np.append(response, np.int32(self._ends[0]))
        if len(prompt) + len(response) > self.limit:
            self.dropped["too_long"] += 1
            return []
        self._prompts.append(prompt)
        self._responses.append(response)
        return [prompt]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        tokens_n = np.array([len(ids) for ids in self._responses])
        return tokens_n + np.array([len(ids) for ids in self._prompts]), tokens_n

    def network(self) -> PreTrainedModel:
        model = policy.load_pretrained(
            self.source.policy, self.source.path, self.config.learner.precision
        )
        model.config.eos_token_id = list(self._ends) if len(self._ends) > 1 else self._ends[0]
        if self.settings.pad_token:
            model.config.pad_token_id = self.source.pad_token(self.kind, self.settings.pad_token)
        return model

    def outputs(self, network: nn.Module, examples: np.ndarray) -> Tensor:
        """−log π of each response, summed over its tokens, nats."""
        device = next(network.parameters()).device
        texts = [np.concatenate([self._prompts[k], self._responses[k]]) for k in examples]
        input_NT, attention_NT = pad_right(texts, self._ends[0], device)
        first_N = torch.tensor([len(self._prompts[k]) for k in examples], device=device)
        column_T = torch.arange(1, input_NT.shape[1], device=device)  # of the tokens predicted
        taken_NT = (column_T >= first_N[:, None]) & attention_NT[:, 1:].bool()
        logits_NTV = network(input_NT, attention_mask=attention_NT, use_cache=False).logits
        nll_K = cross_entropy(
            logits_NTV[:, :-1][taken_NT].float(), input_NT[:, 1:][taken_NT], reduction="none"
        )
        row_K = taken_NT.nonzero()[:, 0]
        return nll_K.new_zeros(len(examples)).index_add(0, row_K, nll_K)

    def losses(self, output_N: Tensor) -> Tensor:
        return output_N

    def figures(self, output_n: np.ndarray, weight_n: np.ndarray) -> dict[str, float]:
        """`held_out_loss`: nats per response token."""
        return {"held_out_loss": float(output_n.sum() / weight_n.sum())}
