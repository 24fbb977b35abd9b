"""From a batch's packed columns to padded tensors, and from a network to log-probabilities.

Shapes: N rollouts, T prompt and response columns, L response columns, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.decoding import text_logits
from actors.rollout import VALID, GroupId, Rollouts, Version

RolloutKey = tuple[GroupId, int]  # group and member


@dataclass
class Padded:
    """Rollouts as right-padded tensors; `rows` cuts out a micro-batch."""

    input_NT: Tensor  # int64, prompt then response
    attention_NT: Tensor | None  # None where nothing is padded
    column_NL: Tensor | None  # where response token l is predicted; None: the last L before the end
    token_NL: Tensor  # int64, response
    mask_NL: Tensor  # bool, response tokens of valid rollouts
    logp_NL: Tensor  # float32, as the engine stored them; NaN where offline data has none
    step_NL: np.ndarray  # int64, of the weights that made each token
    lineage_NL: np.ndarray
    derived_NL: dict[str, Tensor]
    keys: list[RolloutKey]
    temperature: float

    def rows(self, start: int, stop: int) -> "Padded":
        """Rollouts start … stop − 1."""
        return self._cut(slice(start, stop), self.keys[start:stop])

    def take(self, place_N: np.ndarray) -> "Padded":
        """The rollouts at these places, in this order and of the same width: itself if all are."""
        if is_all(place_N, len(self.keys)):
            return self
        return self._cut(place_N, [self.keys[place] for place in place_N])

    def _cut(self, cut: Any, keys: list[RolloutKey]) -> "Padded":
        return Padded(
            self.input_NT[cut],
            None if self.attention_NT is None else self.attention_NT[cut],
            None if self.column_NL is None else self.column_NL[cut],
            self.token_NL[cut],
            self.mask_NL[cut],
            self.logp_NL[cut],
            self.step_NL[cut],
            self.lineage_NL[cut],
            {name: column[cut] for name, column in self.derived_NL.items()},
            keys,
            self.temperature,
        )

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each prompt, and of prompt and response together, [N] int64 each."""
        whole = np.full(len(self.keys), self.input_NT.shape[1])
        if self.attention_NT is None or self.column_NL is None:
            return whole - self.token_NL.shape[1], whole
        total_N = self.attention_NT.sum(1).cpu().numpy()
        return self.column_NL[:, 0].cpu().numpy() + 1, total_N

    def versions(self) -> list[Version]:
        """The versions that made its tokens, oldest first."""
        mask = self.mask_NL.cpu().numpy()
        pairs_P2, _ = distinct(self.lineage_NL[mask], self.step_NL[mask])
        return [Version(lineage, step) for lineage, step in pairs_P2.tolist()]


def is_all(place_N: np.ndarray, count: int) -> bool:
    """Whether these are the places of so many rollouts, one after the other."""
    return len(place_N) == count and bool((place_N == np.arange(count)).all())


def distinct(first_N: np.ndarray, second_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of whole numbers below 2**31, in order, [P, 2], and whose each place is.

    `np.unique` of one key, which is fifty times as fast as of two rows.
    """
    key_N = (first_N.astype(np.int64) << 32) + second_N
    key_P, owner_N = np.unique(key_N, return_inverse=True)
    second_P = key_P.astype(np.int32)
    return np.stack([(key_P - second_P) >> 32, second_P], axis=1), owner_N


def pad(block: Rollouts, device: str = "cpu") -> Padded:
    """A block as padded tensors on a device."""
    members, length_N = block.members, block.length_N
    prompt_N = np.repeat(np.diff(block.prompt_offset_G1), members)
    total_N = prompt_N + length_N
    input_NT = np.zeros((len(length_N), int(total_N.max())), dtype=np.int64)
    column_T = np.arange(input_NT.shape[1])
    is_response = (column_T >= prompt_N[:, None]) & (column_T < total_N[:, None])
    for group in range(block.groups):
        prompt = block.prompt(group)
        input_NT[group * members : (group + 1) * members, : len(prompt)] = prompt
    input_NT[is_response] = block.token_K
    width = max(1, int(length_N.max()))
    filled_NL = np.arange(width) < length_N[:, None]

    def spread(column_K: np.ndarray, empty: float) -> np.ndarray:
        out = np.full(filled_NL.shape, empty, dtype=column_K.dtype)
        out[filled_NL] = column_K
        return out

    uniform = bool((prompt_N == prompt_N[0]).all() and (length_N == width).all())
    valid_N1 = (block.status_N == VALID)[:, None]
    column_NL = np.minimum(prompt_N[:, None] + np.arange(width) - 1, input_NT.shape[1] - 2)
    derived = {n: spread(c, 0.0) for n, c in block.derived.items() if n.endswith("_K")}
    return Padded(
        input_NT=torch.from_numpy(input_NT).to(device),
        attention_NT=None if uniform else torch.from_numpy(column_T < total_N[:, None]).to(device),
        column_NL=None if uniform else torch.from_numpy(column_NL).to(device),
        token_NL=torch.from_numpy(spread(block.token_K, 0).astype(np.int64)).to(device),
        mask_NL=torch.from_numpy(filled_NL & valid_N1).to(device),
        logp_NL=torch.from_numpy(spread(block.logp_K, 0.0)).to(device),
        step_NL=spread(block.step_K, -1),
        lineage_NL=spread(block.lineage_K, -1),
        derived_NL={n: torch.from_numpy(c).to(device) for n, c in derived.items()},
        keys=[(group, member) for group in block.ids() for member in range(members)],
        temperature=block.temperature,
    )


def forward(model: nn.Module, batch: Padded) -> Any:
    """The network's outputs, `logits` [N, T − 1, V] and what else it has.

    The last column predicts nothing, so the network does not see it.
    """
    attention = None if batch.attention_NT is None else batch.attention_NT[:, :-1].long()
    return model(batch.input_NT[:, :-1], attention_mask=attention, use_cache=False)


def before_tokens(out_NTX: Tensor, batch: Padded) -> Tensor:
    """An output at the columns that predict response tokens, [N, L, X]."""
    if batch.column_NL is None:
        return out_NTX[:, -batch.token_NL.shape[1] :]
    rows = torch.arange(len(out_NTX), device=out_NTX.device)[:, None]
    return out_NTX[rows, batch.column_NL]


def distributions(logits_NTV: Tensor, batch: Padded) -> Tensor:
    """log π(· | prefix) before each response token, under the sampler's temperature, [N, L, V]."""
    logits_NLV = before_tokens(logits_NTV, batch)
    return (logits_NLV.float() / batch.temperature).log_softmax(-1)


def values(outputs: Any, batch: Padded) -> Tensor | None:
    """V of the prefix before each response token, 0 where masked, [N, L] float32; None where the
    network has no value head."""
    if outputs.get("value") is None:
        return None
    return torch.where(batch.mask_NL, before_tokens(outputs.value, batch)[..., 0], 0.0)


def conditionals(model: nn.Module, batch: Padded) -> Tensor:
    """`distributions` of a network in training."""
    return distributions(forward(model, batch).logits, batch)


def frozen_conditionals(model: nn.Module, batch: Padded) -> Tensor:
    """`conditionals` of a network that is not, without a gradient: as actors decode."""
    return distributions(text_logits(model, batch.input_NT[:, :-1]), batch)


def token_logps(conditionals_NLV: Tensor, batch: Padded) -> Tensor:
    """log π of the tokens taken, 0 where masked, [N, L]."""
    logp_NL = conditionals_NLV.gather(-1, batch.token_NL[..., None])[..., 0]
    return torch.where(batch.mask_NL, logp_NL, 0.0)


def unpad(value_NL: Tensor, length_N: np.ndarray) -> np.ndarray:
    """The response tokens' values as a packed column, [K] float32."""
    filled_NL = np.arange(value_NL.shape[1]) < length_N[:, None]
    return value_NL.detach().cpu().numpy()[filled_NL].astype(np.float32)
