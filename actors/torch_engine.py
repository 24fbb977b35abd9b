"""The torch engine: batched generation with a KV cache, one keyed uniform number per token.

It runs wherever torch does, and its log-probabilities are those of the very distribution that was
sampled, so it is the reference that other engines are compared with.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from actors import policy
from actors.engine import Request
from actors.packing import does_not_fit, fail_group, pack
from actors.randomness import stream_key, uniforms
from actors.rollout import Rollouts, Version
from configs.schema import Config

NO_VERSION = Version(-1, -1)


class TorchEngine:
    """Generates with transformers on this process's device (see `actors.engine`)."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.cluster.threads)
        self.config = config
        self.version = NO_VERSION
        shape = policy.architecture(config)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = policy.build(shape, config.learner.precision).eval()
        nn.Module.to(self.model, self.device)
        self.end_tokens = torch.tensor(policy.end_tokens(shape), device=self.device)
        self.longest_prompt = policy.context_limit(shape) - config.rollout.max_tokens
        self.vocabulary: int = shape.vocab_size

    def load(self, weights: np.ndarray, version: Version) -> None:
        policy.unflatten(self.model, weights)
        self.version = version

    def generate(self, requests: Sequence[Request], stream: str) -> Rollouts:
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
            block.truncated_N[:] = ~np.isin(last_N, self.end_tokens.cpu().numpy()) & (lengths > 0)
        return block

    def score(self, text_NT: np.ndarray) -> np.ndarray:
        return policy.score(self.model, text_NT, self.device)

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
        input_NP, mask_NP = self._left_padded([r.prompt.ids for r in requests], members)
        place_N1 = mask_NP.sum(1, keepdim=True)
        padded = not bool(mask_NP.all())
        place_NP = (mask_NP.cumsum(1) - 1).clamp_min(0)
        running_N = torch.ones(len(position_N), dtype=torch.bool, device=self.device)
        cache, tokens, logps, runs = None, [], [], []
        for t in range(self.config.rollout.max_tokens):
            out = self.model(
                input_NP, past_key_values=cache, use_cache=True, position_ids=place_NP,
                attention_mask=mask_NP if padded else None, logits_to_keep=1,
            )  # fmt: skip
            cache = out.past_key_values
            logp_NV = (out.logits[:, -1].float() / self.config.rollout.temperature).log_softmax(-1)
            token_N = inverse_cdf(logp_NV, uniforms(key, position_N, member_N, t))
            tokens.append(token_N)
            logps.append(logp_NV.gather(1, token_N[:, None])[:, 0])
            runs.append(running_N)
            if len(self.end_tokens):
                running_N = running_N & ~torch.isin(token_N, self.end_tokens)
                if not bool(running_N.any()):
                    break
            input_NP, place_NP, place_N1 = token_N[:, None], place_N1, place_N1 + 1
            if padded:
                mask_NP = torch.cat([mask_NP, torch.ones_like(mask_NP[:, :1])], 1)
        stack = [torch.stack(x, 1).cpu().numpy() for x in (tokens, logps, runs)]
        return stack[0].astype(np.int32), stack[1].astype(np.float32), stack[2].sum(1)

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
    cdf_NV = logp_NV.double().exp().cumsum(-1)
    target_N1 = torch.from_numpy(uniform_N).to(cdf_NV.device)[:, None] * cdf_NV[:, -1:]
    return torch.searchsorted(cdf_NV, target_N1)[:, 0].clamp_max(logp_NV.shape[1] - 1)
