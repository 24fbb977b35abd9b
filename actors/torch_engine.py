"""The torch engine: batched generation with a KV cache, one keyed uniform number per token.

Once half of a batch has ended, the rest goes on without it.

It runs wherever torch does, and its log-probabilities are those of the very distribution that was
sampled, so it is the reference that other engines are compared with.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from actors import policy
from actors.decoding import start, text_logits
from actors.engine import NO_VERSION, Request
from actors.packing import does_not_fit, fail_group, pack
from actors.randomness import stream_key, uniforms
from actors.rollout import Rollouts, Version
from configs.schema import Config


class TorchEngine:
    """Generates with transformers on this process's device (see `actors.engine`)."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.cluster.threads)
        self.config = config
        self.version = NO_VERSION
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = policy.to_sample(config)
        nn.Module.to(self.model, self.device)
        shape = self.model.config
        self.end_tokens = np.array(policy.end_tokens(shape), dtype=np.int64)
        self.longest_prompt = policy.context_limit(shape) - config.rollout.max_tokens
        self.vocabulary: int = shape.vocab_size

    def load(self, weights: np.ndarray, version: Version) -> None:
        policy.unflatten(self.model, weights)
        self.version = version

    def generate(self, requests: Sequence[Request], stream: str) -> Rollouts:
        if self.version == NO_VERSION:
            raise RuntimeError("no weights are loaded: what the network samples has no version")
        torch.set_num_threads(self.config.cluster.threads)  # counts for the thread that calls it
        members = self.config.rollout.responses_per_prompt
        refused = [does_not_fit(r, self.longest_prompt, self.vocabulary) for r in requests]
        fits = [why is None for why in refused]
        answered = [r for r, ok in zip(requests, fits) if ok]
        token_NL = np.zeros((len(answered) * members, 0), dtype=np.int32)
        logp_NL, length_N = token_NL.astype(np.float32), np.zeros(0, dtype=np.int64)
        if answered:
            token_NL, logp_NL, length_N = self._sample(answered, members, stream)
        lengths = np.zeros(len(requests) * members, dtype=np.int64)
        lengths[np.repeat(fits, members)] = length_N
        kept_NL = np.arange(token_NL.shape[1]) < length_N[:, None]
        tokens = int(kept_NL.sum())
        block = pack(
            requests, members, self.config.rollout.temperature, lengths,
            token_NL[kept_NL], logp_NL[kept_NL],
            np.full(tokens, self.version.lineage), np.full(tokens, self.version.step),
        )  # fmt: skip
        for group, why in enumerate(refused):
            if why:
                fail_group(block, group, why)
        if len(self.end_tokens):
            last_N = np.array(
                [r[-1] if len(r) else -1 for r in map(block.response, range(len(lengths)))]
            )
            block.truncated_N[:] = ~np.isin(last_N, self.end_tokens) & (lengths > 0)
        return block

    def score(self, text_NT: np.ndarray) -> np.ndarray:
        return policy.score(partial(text_logits, self.model), text_NT, self.device)

    def close(self) -> None:
        pass

    @torch.inference_mode()
    def _sample(
        self, requests: list[Request], members: int, stream: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [N, L], log-probabilities [N, L] and lengths [N]; an end token is counted in."""
        key = stream_key(self.config.seed, stream)
        position_N = np.repeat([r.id.position for r in requests], members)
        member_N = np.tile(np.arange(members), len(requests))
        input_RP, mask_NP = self._left_padded([r.prompt.ids for r in requests], members)
        place_R1, place_RP = mask_NP.sum(1, keepdim=True), (mask_NP.cumsum(1) - 1).clamp_min(0)
        longest = self.config.rollout.max_tokens
        token_NL = np.zeros((len(position_N), longest), dtype=np.int32)
        logp_NL = np.zeros((len(position_N), longest), dtype=np.float32)
        length_N, row_R = np.full(len(position_N), longest), np.arange(len(position_N))
        uniform_NL = uniforms(key, position_N[:, None], member_N[:, None], np.arange(longest))
        decoding = start(self.model, mask_NP, longest)
        for t in range(longest):
            logit_RV = decoding.logits(input_RP, place_RP).float()
            logp_RV = logit_RV.div_(self.config.rollout.temperature).log_softmax(-1)
            input_RP = inverse_cdf(logp_RV, uniform_NL[row_R, t])[:, None]
            place_RP = place_R1 + t
            token_NL[row_R, t] = input_RP[:, 0].cpu().numpy()
            logp_NL[row_R, t] = logp_RV.gather(1, input_RP)[:, 0].cpu().numpy()
            ended_R = row_R[(token_NL[row_R, t, None] == self.end_tokens).any(1)]
            length_N[ended_R] = np.minimum(length_N[ended_R], t + 1)
            running_R = length_N[row_R] > t + 1
            if not running_R.any():
                break
            if 2 * running_R.sum() <= len(row_R):  # a smaller batch is worth its copy
                kept_R = torch.from_numpy(np.flatnonzero(running_R)).to(self.device)
                decoding.keep(kept_R)
                row_R, input_RP, place_RP = row_R[running_R], input_RP[kept_R], place_RP[kept_R]
                place_R1 = place_R1[kept_R]
        return token_NL[:, : t + 1], logp_NL[:, : t + 1], length_N

    def _left_padded(self, prompts: list[np.ndarray], members: int) -> tuple[Tensor, Tensor]:
        """Prompts repeated for their members, [N, P] int64, and the mask of what is no padding."""
        width = max(len(p) for p in prompts)
        ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        both = [torch.from_numpy(x.repeat(members, 0)).to(self.device) for x in (ids, mask)]
        return both[0], both[1]


def inverse_cdf(logp_NV: Tensor, uniform_N: np.ndarray) -> Tensor:
    """The token at which each row's cumulated probability passes its uniform number, [N] int64."""
    cdf_NV = logp_NV.to(torch.float64, copy=True).exp_().cumsum_(-1)
    target_N1 = torch.from_numpy(uniform_N).to(cdf_NV.device)[:, None] * cdf_NV[:, -1:]
    return torch.searchsorted(cdf_NV, target_N1)[:, 0].clamp_max(logp_NV.shape[1] - 1)
