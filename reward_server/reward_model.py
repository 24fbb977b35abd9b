"""A learned reward: a decoder with a scalar head on the last token, from a model directory."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from actors import policy
from configs.schema import RewardConfig
from reward_server import model_files

PAD = 0  # any id: what is masked is never looked at


class RewardModel:
    """Scores prompt and response together by the head's output at their last token.

    A response is fed as it is: one that is only an end token has that token scored, an empty one
    leaves the prompt alone. Texts are sorted by length and cut into micro-batches of at most
    `reward.batch_tokens` tokens, padding included, so little of that is padding.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.model = load(config)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        nn.Module.to(self.model, self.device)
        self.budget = config.batch_tokens
        shape = self.model.config.get_text_config()
        self.context = policy.context_limit(shape)
        self.vocabulary = int(shape.vocab_size)

    @torch.inference_mode()
    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Rewards [n] float32. ValueError, before anything is computed, for a text that the model
        cannot read."""
        texts = [[*prompt, *response] for prompt, response in zip(prompts, responses)]
        for text in texts:
            self._refuse(text)
        length_N = np.array([len(text) for text in texts], dtype=np.int64)
        score_N = np.empty(len(texts), dtype=np.float32)
        for rows in micro_batches(length_N, self.budget):
            token_NT = np.full((len(rows), length_N[rows].max()), PAD, dtype=np.int64)
            for place, row in enumerate(rows):
                token_NT[place, : length_N[row]] = texts[row]
            token, length = torch.from_numpy(token_NT), torch.from_numpy(length_N[rows])
            scored = score(self.model, token.to(self.device), length.to(self.device))
            score_N[rows] = scored.float().cpu().numpy()
        return score_N

    def _refuse(self, text: list[int]) -> None:
        if not 0 < len(text) <= self.context:
            limit = f"the reward model's context is 1 … {self.context}"
            raise ValueError(f"prompt and response have {len(text)} tokens; {limit}")
        if not 0 <= min(text) <= max(text) < self.vocabulary:
            outside = next(token for token in text if not 0 <= token < self.vocabulary)
            known = f"the reward model knows 0 … {self.vocabulary - 1}"
            raise ValueError(f"token {outside} is in the text; {known}")


def load(config: RewardConfig) -> PreTrainedModel:
    """The network of a reward model's directory, for scoring (safetensors only, no remote code).

    ValueError in one line where it is none, or weights are missing, which transformers would draw
    at random.
    """
    model_files.check(config)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            model_files.directory(config),
            num_labels=1,
            dtype=policy.DTYPES[config.precision],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"reward.path={config.path}: cannot be loaded: {why}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"reward.path={config.path}: weights are missing: {missing}")
    return model.eval().requires_grad_(False)


def score(model: PreTrainedModel, token_NT: Tensor, length_N: Tensor) -> Tensor:
    """The scalar head at each row's last token, [N]; rows are padded on the right with any id.

    Rows end where `length_N` says, and not where transformers finds the last token that is no
    padding: where the end token also pads, that is the token before it. Attention is causal and
    padding masked, so a score does not depend on the other rows. Differentiable.
    """
    place_NT = torch.arange(token_NT.shape[1], device=token_NT.device)
    mask_NT = (place_NT < length_N[:, None]).long()
    body = model.base_model
    hidden_NTD = body(token_NT, attention_mask=mask_NT, use_cache=False).last_hidden_state
    last_ND = hidden_NTD[torch.arange(len(token_NT), device=token_NT.device), length_N - 1]
    head: Any = model.score
    score_N1: Tensor = head(last_ND)
    return score_N1[:, 0]


def micro_batches(length_N: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows by rising length, cut so that rows times the longest is at most `budget` tokens.

    A row that is over the budget by itself stands alone.
    """
    order = np.argsort(length_N, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    for stop in range(1, len(order) + 1):
        full = stop == len(order) or (stop + 1 - start) * length_N[order[stop]] > budget
        if full:
            batches.append(order[start:stop])
            start = stop
    return batches
