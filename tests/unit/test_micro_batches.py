"""Micro-batches by tokens: the same loss and gradient however a minibatch is cut."""

import numpy as np
import pytest
import torch

from configs.schema import Config
from learner.engine import join
from learner.learner import Learner
from learner.micro_batches import micro_batches
from learner.packing import cost, fed
from tests.harness import free_port, settings
from tests.varying import batch_of, rollouts, settings_for

COMMON = (
    "rollout.responses_per_prompt=4", "learner.minibatch=24", "replay.samples_per_round=24",
    "replay.inner_epochs=1",
)  # fmt: skip


def lengths(index) -> np.ndarray:
    return np.where(index.valid_M, fed(index.prompt_M + index.length_M), 0)


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("preset, unit", [("bandit_dpo", 4), ("bandit_ppo", 1)])
def test_every_rollout_is_in_one_micro_batch_within_the_limit(preset, unit, ranks, packing):
    config = settings(preset, *COMMON, "learner.micro_tokens=160", f"learner.ranks={ranks}",
                      f"learner.packing={packing}")  # fmt: skip
    block = rollouts()
    index = batch_of(block).index
    cuts = [micro_batches(index, config, rank) for rank in range(ranks)]
    assert len({len(cut) for cut in cuts}) == 1
    for rank, cut in enumerate(cuts):
        batch = batch_of(block, rank, ranks)
        size = 0 if batch.block is None else len(batch.block.reward_N)
        mine = np.concatenate(cut)
        assert sorted(mine) == list(range(batch.first, batch.first + size))
        for part in cut:
            assert len(part) % unit == 0
            assert (part.reshape(-1, unit) // unit == part.reshape(-1, unit)[:, :1] // unit).all()
            within = cost(lengths(index)[part], config.learner.packing) <= 160
            assert within or len(part) == unit


def test_packing_needs_fewer_micro_batches_for_whole_groups():
    index = batch_of(rollouts()).index
    common = ("bandit_dpo", *COMMON, "learner.micro_tokens=160")
    padded = micro_batches(index, settings(*common), 0)
    packed = micro_batches(index, settings(*common, "learner.packing=true"), 0)
    assert len(packed) < len(padded)


def test_both_limits_hold():
    config = settings("bandit_ppo", *COMMON, "learner.micro_tokens=10000", "learner.micro_batch=5")
    parts = micro_batches(batch_of(rollouts()).index, config, 0)
    assert [len(part) for part in parts] == [5, 5, 5, 5, 4]


def test_without_a_token_limit_a_slice_is_cut_in_order_by_count():
    config = settings("bandit_ppo", *COMMON, "learner.micro_batch=8", "learner.ranks=4")
    index = batch_of(rollouts()).index  # six groups on four ranks: 2, 2, 2 and none
    cuts = [[part.tolist() for part in micro_batches(index, config, rank)] for rank in range(4)]
    assert cuts == [[list(range(r * 8, r * 8 + 8))] for r in range(3)] + [[[]]]


class Accumulated:
    """Loss, gradient, derived columns and cells of one batch, without the step."""

    def __init__(self, config: Config, learner: Learner) -> None:
        def instead(rate: float) -> bool:
            parameters = learner.engine.engine.module.parameters()
            self.gradient = torch.cat([p.grad.flatten().clone() for p in parameters])
            learner.engine.engine.zero_grad()
            return False

        learner.config, learner.engine.step = config, instead  # type: ignore[method-assign]
        record, self.derived = learner.consume(batch_of(rollouts()))
        self.loss, self.cells = record.loss, record.cells


def learner(config: Config) -> Learner:
    join(0, 1, ("127.0.0.1", free_port()), 1)
    return Learner(config, 0)


CUTS = [
    ("learner.micro_batch=4",),
    ("learner.micro_tokens=90",),
    ("learner.micro_tokens=250",),
    ("learner.packing=true",),
    ("learner.packing=true", "learner.micro_tokens=90"),
    ("learner.packing=true", "learner.micro_tokens=250", "learner.micro_batch=12"),
]


@pytest.mark.parametrize(
    "preset, shape",
    [("bandit_dpo", "gpt2"), ("bandit_dpo", "gpt_neox"), ("bandit_dpo", "llama"),
     ("bandit_ppo", "gpt2"), ("bandit_reinforce", "gpt_neox"), ("bandit_best_of_n", "llama")],
)  # fmt: skip
def test_no_cut_changes_loss_gradient_or_measures(tmp_path, preset, shape):
    common = (preset, *COMMON, *settings_for(tmp_path, shape))
    plain = learner(settings(*common))
    whole = Accumulated(settings(*common), plain)
    assert whole.gradient.abs().max() > 1e-3
    for cut in CUTS:
        same(Accumulated(settings(*common, *cut), plain), whole)
    exact = learner(settings(*common, "learner.exact_kl=true"))
    for cut in ((), ("learner.micro_tokens=90",)):
        same(Accumulated(settings(*common, "learner.exact_kl=true", *cut), exact), whole)


@pytest.mark.parametrize("shape, zero_stage", [("gpt2", 3), ("gpt_neox", 0), ("llama", 3)])
def test_gradient_checkpointing_changes_no_loss_and_no_step(tmp_path, shape, zero_stage):
    common = ("bandit_dpo", *COMMON, *settings_for(tmp_path, shape), "learner.packing=true",
              "learner.micro_tokens=90", f"learner.zero_stage={zero_stage}")  # fmt: skip
    found = []
    for checkpointing in ("false", "true"):
        config = settings(*common, f"learner.gradient_checkpointing={checkpointing}")
        ours = learner(config)
        assert ours.engine.engine.module.is_gradient_checkpointing == (checkpointing == "true")
        losses = []
        for number in range(3):
            record, _ = ours.consume(batch_of(rollouts(), number=number))
            assert record.stepped
            losses.append(record.loss)
        found.append((losses, ours.weights().copy()))
    assert np.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert np.abs(found[0][1] - found[1][1]).mean() < 1e-6


def same(one: Accumulated, other: Accumulated) -> None:
    """Equal to 1e-5 of loss and gradient; measures to 1e-4 of themselves."""
    assert abs(one.loss - other.loss) < 1e-5 * max(1.0, abs(other.loss))
    size = max(1.0, float(other.gradient.abs().max()))
    assert (one.gradient - other.gradient).abs().max() < 1e-5 * size
    assert one.derived.keys() == other.derived.keys() == {"reference_logp_K"}
    for name, column_K in other.derived.items():
        assert np.allclose(one.derived[name], column_K, atol=1e-5)
    assert one.cells.keys() == other.cells.keys() == {(0, 1)}
    for name in ("rollouts", "tokens", "gradient_weight", "sampled_kl_from_generator"):
        assert np.isclose(one.cells[0, 1][name], other.cells[0, 1][name], rtol=1e-4)
