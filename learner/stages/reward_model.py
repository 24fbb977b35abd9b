"""A reward model after Bradley and Terry: equation (3) of arXiv 2404.14367.

Rows are those of `actors.preference_rows`: a pair, or a group of scored or labelled responses whose
members are paired wherever they differ. A response is taken as it is; its reward is read from its
last token, so where it ended that is the end token.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from actors import policy
from actors.preference_rows import OfflineGroup, TiedError, parse_group
from actors.randomness import stream_key
from actors.rollout import UNLABELLED
from actors.tables import DataError, Row
from configs.schema import Config
from learner.stages.base import Stage
from learner.stages.source import pad_right

BINS = 10  # of the calibration error, over confidences 0.5 … 1


class RewardModel(Stage):
    """loss = − mean log σ(r(x, y_w) − r(x, y_l)), an output of a pair being that difference."""

    kind = "reward_model"
    unit = "pairs"

    def __init__(self, config: Config) -> None:
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []  # texts: the better, the worse
        self._pad: int | None = None
        super().__init__(config)

    def take(self, row: Row) -> Sequence[np.ndarray]:
        if self._pad is None:
            self._pad = self.source.pad_token(self.kind, self.settings.pad_token)
            self.dropped["equal"] = 0
        try:
            group = parse_group(
                row, self.source.vocabulary, self.source.encoder, self.settings.format
            )
        except TiedError:
            self.dropped["equal"] += 1
            return []
        if any(ids[-1] == self._pad for ids in group.responses):
            raise DataError(f"{row.where}: a response ends with the pad token {self._pad}")
        ranked = ordered_pairs(group, row.where)
        texts = [np.concatenate([group.prompt_ids, ids]) for ids in group.responses]
        fitting = [pair for pair in ranked if max(len(texts[i]) for i in pair) <= self.limit]
        self._pairs += [(texts[winner], texts[loser]) for winner, loser in fitting]
        if not fitting:
            self.dropped["too_long" if ranked else "equal"] += 1
        return [group.prompt_ids] * len(fitting)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        length_n = np.array([sum(map(len, pair)) for pair in self._pairs])
        return length_n, np.ones_like(length_n)

    def network(self) -> PreTrainedModel:
        torch.manual_seed(stream_key(self.config.seed, "reward_model/head") >> 1)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.source.path,
            revision=self.source.policy.revision or None,
            num_labels=1,
            dtype=policy.DTYPES[self.config.learner.precision],
            use_safetensors=True,
            trust_remote_code=False,
        )
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = self._pad
        return model

    def outputs(self, network: nn.Module, examples: np.ndarray) -> Tensor:
        """r(x, y_w) − r(x, y_l) of each pair."""
        assert self._pad is not None
        device = next(network.parameters()).device
        pairs = [self._pairs[k] for k in examples]
        texts = [winner for winner, _ in pairs] + [loser for _, loser in pairs]
        input_NT, attention_NT = pad_right(texts, self._pad, device)
        logits_N1 = network(input_NT, attention_mask=attention_NT, use_cache=False).logits
        better_N, worse_N = logits_N1[:, 0].float().split(len(pairs))
        return better_N - worse_N

    def losses(self, output_N: Tensor) -> Tensor:
        return -logsigmoid(output_N)

    def figures(self, output_n: np.ndarray, weight_n: np.ndarray) -> dict[str, float]:
        return calibration(output_n)


def ordered_pairs(group: OfflineGroup, where: str) -> list[tuple[int, int]]:
    """(better, worse) for every two members that differ: in reward if all have one, else in label.

    As the pairwise objectives have it (`learner.signals`). DataError where fewer than two members
    have a reward or a label.
    """
    score_C = group.rewards_C.astype(np.float64)
    if np.isnan(score_C).any():
        score_C = np.where(group.labels_C == UNLABELLED, np.nan, group.labels_C)
    if np.count_nonzero(~np.isnan(score_C)) < 2:
        raise DataError(f"{where}: fewer than two responses have a reward or a label to compare")
    members = range(len(score_C))
    return [(i, j) for i, j in itertools.product(members, members) if score_C[i] > score_C[j]]


def calibration(margin_n: np.ndarray) -> dict[str, float]:
    """Loss, accuracy and calibration of margins r(x, y_w) − r(x, y_l), [n], of held-out pairs.

    p = σ(margin) is the probability given to the winner, a margin of 0 half right.
    `held_out_calibration_error`: Σ_b (n_b/n)·|accuracy_b − confidence_b| over BINS equal bins of
    confidence max(p, 1 − p), in 0.5 … 1 (Guo et al. 2017, arXiv 1706.04599, equation 3).
    `held_out_brier`: mean (1 − p)² (Brier 1950).
    """
    margin_n = margin_n.astype(np.float64)
    p_n = (1.0 + np.tanh(margin_n / 2.0)) / 2.0
    right_n = (np.sign(margin_n) + 1.0) / 2.0
    sure_n = np.maximum(p_n, 1.0 - p_n)
    bin_n = np.minimum(((sure_n - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right_n - sure_n)[bin_n == b].sum())) for b in range(BINS)]
    return {
        "held_out_loss": float(np.logaddexp(0.0, -margin_n).mean()),
        "held_out_accuracy": float(right_n.mean()),
        "held_out_calibration_error": sum(gaps) / len(margin_n),
        "held_out_brier": float(((1.0 - p_n) ** 2).mean()),
    }
