"""Weights made ready beside the live ones, over vLLM's real oneDNN layers in this process."""

import subprocess
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

WIDTH, OUT = 32, 48
ROWS = 7


class Linear(nn.Module):
    """A layer as vLLM leaves it after loading: packed, its weight freed, its shape recorded."""

    def __init__(self, rows: int = OUT, keep: bool = False) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.model_loader.reload.layerwise import (
            record_metadata_for_reloading,
        )

        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, WIDTH), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(rows), requires_grad=False)
        record_metadata_for_reloading(self)
        dispatch_cpu_unquantized_gemm(self, remove_weight=not keep)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.cpu_linear(x_NI, self.weight, self.bias)


@pytest.fixture
def made() -> SimpleNamespace:
    """A model, its flat array and a loader that copies as vLLM's do: whole, transposed, by parts
    (a fused q, k, v), and into the first rows of a padded vocabulary whose weight is kept."""
    model = nn.ModuleDict({"whole": Linear(), "turned": Linear(), "fused": Linear(),
                           "head": Linear(keep=True)})  # fmt: skip
    sizes = [OUT * WIDTH] * 3 + [(OUT - 8) * WIDTH] + [OUT] * 4
    flat = torch.randn(sum(sizes))
    w, t, f, h, *biases = flat.split(sizes)

    def load() -> None:
        model["whole"].weight.data.copy_(w.view(OUT, WIDTH))
        model["turned"].weight.data.copy_(t.view(WIDTH, OUT).t())
        for place in (32, 0, 16):  # in any order
            part = f.view(OUT, WIDTH)[place : place + 16]
            model["fused"].weight.data.narrow(0, place, 16).copy_(part)
        model["head"].weight[: OUT - 8].data.copy_(h.view(OUT - 8, WIDTH))
        for layer, bias in zip(model.values(), biases):
            layer.bias.data.copy_(bias)

    def expected(x: Tensor) -> list[Tensor]:
        padded = torch.cat([h.view(OUT - 8, WIDTH), torch.zeros(8, WIDTH)])
        weights = [w.view(OUT, WIDTH), t.view(WIDTH, OUT).t(), f.view(OUT, WIDTH), padded]
        return [x @ weight.t() + bias for weight, bias in zip(weights, biases)]

    return SimpleNamespace(model=model, flat=flat, load=load, expected=expected)


def staged(made: SimpleNamespace) -> Any:
    from actors.vllm_staging import Staging

    return Staging(made.model, made.flat, made.load, lambda count: None)


def begin(staging: Any) -> None:
    """Stage, and wait until it is done."""
    done = threading.Event()
    staging.begin(lambda _: done.set())
    assert done.wait(20.0)


def outputs(made: SimpleNamespace, x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in made.model.values()]


@torch.no_grad()
def test_each_swap_brings_the_weights_that_were_there_at_the_start_and_none_comes_before(made):
    x = torch.randn(ROWS, WIDTH)
    staging = staged(made)
    for _ in range(3):
        before = outputs(made, x)
        made.flat.normal_()
        begin(staging)
        for live, old in zip(outputs(made, x), before):
            assert torch.equal(live, old)  # what generates goes on with the version before
        staging.swap()
        for live, new in zip(outputs(made, x), made.expected(x)):
            torch.testing.assert_close(live, new, atol=1e-4, rtol=1e-4)
    assert made.model["whole"].weight.numel() == 0  # vLLM's own layout is as it was
    assert made.model["head"].weight.shape == (OUT, WIDTH)


def test_a_failure_in_the_thread_is_raised_at_the_swap_and_the_live_weights_stay(made, monkeypatch):
    x = torch.randn(ROWS, WIDTH)
    staging = staged(made)
    begin(staging)
    staging.swap()
    before = outputs(made, x)
    monkeypatch.setattr(staging, "_pack", lambda: 1 / 0)
    made.flat.normal_()
    begin(staging)
    with pytest.raises(ZeroDivisionError):
        staging.swap()
    assert all(torch.equal(live, old) for live, old in zip(outputs(made, x), before))


@torch.no_grad()
def test_weights_are_packed_as_they_come_and_none_before(made):
    from actors.vllm_staging import Staging

    x, asked, there, done = torch.randn(ROWS, WIDTH), [], threading.Event(), threading.Event()

    def arrived(count: int) -> None:
        asked.append(count)
        assert there.wait(20.0)

    staging = Staging(made.model, made.flat, made.load, arrived)
    staging.begin(lambda _: done.set())
    assert not done.wait(0.1)
    made.flat.normal_()
    there.set()
    assert done.wait(20.0)
    staging.swap()
    for live, new in zip(outputs(made, x), made.expected(x)):
        torch.testing.assert_close(live, new, atol=1e-4, rtol=1e-4)
    assert sorted(asked)[0] == OUT * WIDTH and asked[-1] == made.flat.numel()


def test_a_worker_whose_owner_is_gone_waits_for_no_more_weights(monkeypatch):
    from actors import vllm_transfer

    ended = threading.Event()
    monkeypatch.setattr(vllm_transfer.os, "kill", lambda pid, number: ended.set())
    worker = object.__new__(vllm_transfer.SharedMemoryTransfer)
    worker.flat, worker.mark = torch.zeros(8), np.zeros(2, dtype=np.int64)
    waiting = threading.Thread(target=worker._arrived, args=(8,), daemon=True)
    waiting.start()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as owner:
        vllm_transfer.end_with(owner.pid, worker._let_go)
        waiting.join(0.1)
        assert waiting.is_alive() and not ended.is_set()
    waiting.join(20.0)
    assert not waiting.is_alive() and ended.wait(20.0)


def computed(made: SimpleNamespace) -> None:
    made.load = lambda: made.model["whole"].weight.data.copy_(torch.ones(OUT, WIDTH))


def incomplete(made: SimpleNamespace) -> None:
    made.load = lambda: None


def torch_linear(made: SimpleNamespace) -> None:
    made.model["turned"].cpu_linear = torch.nn.functional.linear


def quantized(made: SimpleNamespace) -> None:
    made.model["fused"].quant_method = object()


@pytest.mark.parametrize("change", [computed, incomplete, torch_linear, quantized])
def test_what_is_no_plain_copy_into_a_onednn_layer_is_left_to_vllm(made, change):
    from actors.vllm_staging import CannotStage

    change(made)
    with pytest.raises(CannotStage):
        staged(made)
    assert made.model["whole"].weight.numel() == 0
