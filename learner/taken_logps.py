"""log-softmax at the tokens taken, in the memory of the logits.

Autograd's own, of `gather` and `logsumexp`, makes six more arrays of that size on its way forth and
back; and the logits are the largest there is, of which each page must first be had and cleared.
Shapes: K response tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED, LAUNCHED = 2**18, 2**26  # numbers at a time: a core's cache holds them; worth GPU kernels


def taken_logps(logits_KV: Tensor, token_K: Tensor) -> Tensor:
    """log softmax(logits)[token], [K] float32. The gradient is written over the logits, so they may
    be no one else's, and a second backward pass raises RuntimeError.

    logits_KV: float32. token_K: int64.
    """
    logp_K: Tensor = _TakenLogps.apply(logits_KV, token_K[:, None])
    return logp_K


class _TakenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, token_K1: Tensor) -> Tensor:
        norms = [part_RV.logsumexp(-1, keepdim=True) for part_RV in _parts(logits_KV)]
        norm_K1 = torch.cat(norms)
        ctx.save_for_backward(logits_KV, norm_K1, token_K1)
        return (logits_KV.gather(-1, token_K1) - norm_K1)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_K: Tensor) -> tuple[Tensor, None]:
        """∂/∂logit v: gradient · (1 where v was taken − softmax)."""
        logits_KV, norm_K1, token_K1 = ctx.saved_tensors
        gradient_K1 = gradient_K[:, None]
        rows = _rows(logits_KV)
        for part_RV, norm_R1, slope_R1 in zip(
            logits_KV.split(rows), norm_K1.split(rows), gradient_K1.neg().split(rows)
        ):
            part_RV.sub_(norm_R1).exp_().mul_(slope_R1)
        return logits_KV.scatter_add_(-1, token_K1, gradient_K1), None


def _parts(logits_KV: Tensor) -> tuple[Tensor, ...]:
    return logits_KV.split(_rows(logits_KV))


def _rows(logits_KV: Tensor) -> int:
    numbers = LAUNCHED if logits_KV.is_cuda else CACHED
    return max(1, numbers // logits_KV.shape[1])
