"""log-softmax at the tokens taken: NumPy's numbers, in the logits' own memory."""

import numpy as np
import pytest
import torch

from learner import taken_logps as module
from learner.taken_logps import taken_logps


def drawn(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that softmax needs its maximum for, tokens, and a gradient that comes back."""
    generator = torch.Generator().manual_seed(0)
    logits_KV = 60 * torch.randn(rows, vocabulary, generator=generator)
    token_K = torch.randint(0, vocabulary, (rows,), generator=generator)
    return logits_KV, token_K, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("numbers", [1, 40, 10**6])
def test_values_and_gradient_are_those_of_numpy_whatever_goes_at_a_time(monkeypatch, numbers):
    monkeypatch.setattr(module, "CACHED", numbers)
    logits_KV, token_K, gradient_K = drawn(7, 13)
    x, rows, token = logits_KV.double().numpy(), np.arange(7), token_K.numpy()
    shifted = np.exp(x - x.max(1, keepdims=True))
    share = shifted / shifted.sum(1, keepdims=True)
    expected = -share * gradient_K.double().numpy()[:, None]
    expected[rows, token] += gradient_K.double().numpy()
    leaf_KV = logits_KV.clone().requires_grad_()
    logp_K = taken_logps(leaf_KV * 1.0, token_K)
    logp_K.backward(gradient_K)
    norm = np.log(shifted.sum(1)) + x.max(1)
    np.testing.assert_allclose(logp_K.detach(), x[rows, token] - norm, rtol=0, atol=2e-5)
    np.testing.assert_allclose(leaf_KV.grad, expected, rtol=0, atol=2e-5)


def test_the_gradient_takes_the_logits_place():
    logits_KV, token_K, gradient_K = drawn(5, 8)
    leaf_KV = logits_KV.clone().requires_grad_()
    on_the_way_KV, came_back = leaf_KV * 1.0, []
    on_the_way_KV.register_hook(lambda gradient_KV: came_back.append(gradient_KV.data_ptr()))
    taken_logps(on_the_way_KV, token_K).backward(gradient_K)
    assert came_back == [on_the_way_KV.data_ptr()]


def test_a_second_backward_pass_is_an_error_and_not_another_gradient():
    logits_KV, token_K, gradient_K = drawn(5, 8)
    leaf_KV = logits_KV.clone().requires_grad_()
    logp_K = taken_logps(leaf_KV * 1.0, token_K)
    logp_K.backward(gradient_K, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp_K.backward(gradient_K)
