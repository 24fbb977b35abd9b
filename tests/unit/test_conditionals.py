"""Exact distributions of a round: what a later pass finds of the first, and how they are read."""

import numpy as np
import pytest
import torch

from learner.batch import conditionals, frozen_conditionals, pad
from tests.harness import Local, settings
from tests.varying import SHAPES, network, rollouts


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("computed anew")


def test_later_passes_find_in_any_order_what_the_first_computed():
    local = Local(settings("bandit", "replay.inner_epochs=3"))
    local.generate()
    part, kept = pad(local.queue.get(0, 0, 0).block), local.learner.conditionals
    count = len(part.keys)
    first_NLV = kept.of_reference(part)
    kept.reference = refuse
    for place_N in (np.arange(count), np.arange(count)[::-1].copy(), np.arange(10, 30)):
        assert torch.equal(kept.of_reference(part.take(place_N)), first_NLV[place_N])
    kept.start_round()
    with pytest.raises(RuntimeError, match="computed anew"):
        kept.of_reference(part)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_frozen_network_has_the_distributions_that_it_has_in_training(shape):
    model, batch = network(shape), pad(rollouts())
    assert batch.attention_NT is not None  # some are shorter, and padded
    there = batch.mask_NL[..., None]
    ours_NLV, theirs_NLV = frozen_conditionals(model, batch), conditionals(model, batch)
    torch.testing.assert_close(ours_NLV * there, theirs_NLV * there, rtol=0, atol=1e-5)
