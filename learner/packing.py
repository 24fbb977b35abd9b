"""One forward pass for rollouts of varying lengths, and of its logits only those that are wanted.

Two layouts of the same sequences (prompt, then response): *padded*, one to a row; and *packed*,
several to a row, with position ids that restart at each, from which transformers confines attention
to a sequence (`masking_utils.find_packed_sequence_indices`; sdpa and eager attention). A sequence's
last token predicts nothing, and the network is not given it. Rows are as wide as the longest
sequence, so packing never costs attention more than padding does. Sequences without a valid
response token, failed members for one, are in neither. The output layer sees the positions that
predict a response token and no others: [K, V] logits, not [N, T, V].
Shapes: N rollouts, R rows of T tokens, L response columns, K response tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.batch import Padded
from learner.taken_logps import taken_logps


@dataclass(frozen=True)
class Rows:
    """What the network is given, and where it predicts the response tokens, by `mask_NL`."""

    input_RT: Tensor  # int64
    position_RT: Tensor | None  # int64; None: 0 … T − 1 in every row, one sequence each
    row_K: Tensor  # int64
    column_K: Tensor  # int64, of the token before


def first_fit(length_N: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and first column of each sequence, [N] int64 each: first-fit decreasing bin packing.

    Johnson et al. 1974: at most 11/9 of the fewest rows, plus one. Lengths are at most `width`.
    """
    row_N, start_N, used_R = (np.zeros(len(length_N), dtype=np.int64) for _ in range(3))
    rows = 0
    for n in np.argsort(-length_N, kind="stable"):
        row = int(np.argmax(used_R[: rows + 1] + length_N[n] <= width))
        row_N[n], start_N[n] = row, used_R[row]
        used_R[row] += length_N[n]
        rows = max(rows, min(row + 1, len(length_N) - 1))
    return row_N, start_N


def fed(total_N: np.ndarray) -> np.ndarray:
    """How many tokens of sequences of these lengths a network is given, of any shape: all but the
    last, which predicts nothing."""
    return np.maximum(total_N - 1, 0)


def cost(fed_N: np.ndarray, packing: bool) -> int:
    """Tokens that a forward pass takes, padding included. fed_N: see `fed`; 0 where a sequence is
    left out."""
    fed_N = fed_N[fed_N > 0]
    if not len(fed_N):
        return 0
    width = int(fed_N.max())
    return width * (int(first_fit(fed_N, width)[0].max()) + 1 if packing else len(fed_N))


def rows(batch: Padded, packing: bool) -> Rows:
    """A micro-batch's sequences, laid out; of one token 0 where it has no response token."""
    device = batch.input_NT.device
    mask_NL = batch.mask_NL.cpu().numpy()
    kept_S = np.flatnonzero(mask_NL.any(1))
    if not len(kept_S):
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return Rows(torch.zeros((1, 1), dtype=torch.long, device=device), None, nothing, nothing)
    prompt_S, total_S = (length_N[kept_S] for length_N in batch.lengths())
    assert prompt_S.min() > 0, "a response's first token is predicted by the prompt's last"
    fed_S = fed(total_S)
    width = int(fed_S.max())
    row_S, start_S = np.arange(len(kept_S)), np.zeros(len(kept_S), dtype=np.int64)
    if packing:
        row_S, start_S = first_fit(fed_S, width)
    sequence_J = np.repeat(np.arange(len(kept_S)), fed_S)
    place_J = np.arange(len(sequence_J)) - np.repeat(np.cumsum(fed_S) - fed_S, fed_S)
    input_RT, position_RT = np.zeros((2, int(row_S.max()) + 1, width), dtype=np.int64)
    to_J = row_S[sequence_J], start_S[sequence_J] + place_J
    input_RT[to_J] = batch.input_NT.cpu().numpy()[kept_S[sequence_J], place_J]
    position_RT[to_J] = place_J
    sequence_K, l_K = mask_NL[kept_S].nonzero()
    column_K = (start_S + prompt_S - 1)[sequence_K] + l_K

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    positions = tensor(position_RT) if packing else None
    return Rows(tensor(input_RT), positions, tensor(row_S[sequence_K]), tensor(column_K))


def response_logps(model: nn.Module, batch: Padded, packing: bool) -> Tensor:
    """log π of the response tokens taken, under the sampler's temperature, 0 where masked, [N, L].

    The same numbers as `batch.token_logps(batch.conditionals(model, …), …)` in a part of the
    memory.
    """
    return logps_and_values(model, batch, packing)[0]


def logps_and_values(
    model: nn.Module, batch: Padded, packing: bool
) -> tuple[Tensor, Tensor | None]:
    """`response_logps`, and the values of the prefixes as `batch.values` has them, [N, L] each.

    model: of transformers, with or without a value head, or a DeepSpeed engine of one.
    """
    laid = rows(batch, packing)
    with _head_sees(model, laid.row_K, laid.column_K):
        out = model(laid.input_RT, position_ids=laid.position_RT, use_cache=False)
    logits_KV = out.logits.squeeze(0).float()
    if batch.temperature != 1.0:
        logits_KV = logits_KV / batch.temperature
    logp_K = taken_logps(logits_KV, batch.token_NL[batch.mask_NL])
    values = out.get("value")
    value_K = None if values is None else values[laid.row_K, laid.column_K, 0]
    return _spread(logp_K, batch), None if value_K is None else _spread(value_K, batch)


def _spread(value_K: Tensor, batch: Padded) -> Tensor:
    """Response tokens' numbers in their places, 0 elsewhere, [N, L]."""
    empty_NL = torch.zeros(batch.mask_NL.shape, device=value_K.device)
    return empty_NL.masked_scatter(batch.mask_NL, value_K)


@contextmanager
def _head_sees(model: nn.Module, row_K: Tensor, column_K: Tensor) -> Iterator[None]:
    """Meanwhile the output layer is given these positions only: hidden states [1, K, width]."""
    network: Any = getattr(model, "module", model)

    def select(head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][row_K, column_K].unsqueeze(0), *given[1:])

    hook = network.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def check_boundaries(model: nn.Module, vocabulary: int) -> None:
    """Raise ValueError where a sequence's neighbour in its row changes the network's output.

    For architectures that do not read packing from position ids. Two rows hold the same second
    sequence after different first ones; masked attention adds exact zeros, in any precision.
    """
    device = next(model.parameters()).device
    input_RT = torch.tensor([[0, 1, 2, 3, 2, 1], [4, 5, 6, 3, 2, 1]], device=device) % vocabulary
    position_RT = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=device)
    logits_RTV = model(input_RT, position_ids=position_RT, use_cache=False).logits.float()
    one, other = logits_RTV[:, 3:]
    if not torch.allclose(one, other, rtol=1e-5, atol=1e-6):
        network = type(getattr(model, "module", model)).__name__
        raise ValueError(
            f"learner.packing=true: attention of {network} reaches across the "
            "sequences of a row; set learner.packing=false"
        )
