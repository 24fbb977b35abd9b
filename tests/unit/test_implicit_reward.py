"""log π_θ/π_ref of preferred and dispreferred responses (Figures 9, 17 and 18), by every
contrastive and likelihood objective."""

import itertools

import numpy as np
import pytest
import torch

from configs.objectives import TABLE
from learner import cells
from learner.batch import conditionals, pad, token_logps
from learner.learner import StepRecord
from tests.harness import Local, settings

PREFERRED, DISPREFERRED = "implicit_reward_preferred", "implicit_reward_dispreferred"
PRESETS = {
    "bandit_best_of_n": "best_of_n", "bandit_best_of_n_negative": "best_of_n_negative",
    "bandit_rwr": "rwr", "bandit_rest": "rest", "bandit_dpo": "dpo", "bandit": "ipo",
    "offline_pref_ft": "pref_ft", "offline_binary_feedme": "binary_feedme",
}  # fmt: skip
SMALL = ["learner.updates=3", "learner.minibatch=20", "replay.samples_per_round=20",
         "replay.inner_epochs=3", "data.prompts=2"]  # fmt: skip


def last(preset: str, *more: str) -> tuple[Local, StepRecord]:
    local = Local(settings(preset, *SMALL, *more))
    return local, list(local.steps(3))[-1]


def test_every_objective_but_policy_gradients_prefers():
    assert {name for name, traits in TABLE.items() if traits.prefers} == set(PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_measured_by_contrastive_and_likelihood_objectives(preset):
    _, record = last(preset)
    measures = cells.finish(cells.total(record.cells))
    assert np.isfinite(measures[PREFERRED]) and np.isfinite(measures[DISPREFERRED])


def test_policy_gradients_have_none():
    _, record = last("bandit_ppo")
    assert PREFERRED not in cells.finish(cells.total(record.cells))


def test_it_is_the_mean_over_all_pairs_of_the_minibatch():
    local, _ = last("bandit_rwr", "replay.inner_epochs=6", "learner.updates=6")
    batch = local.queue.get(0, 3, 0)
    part = pad(batch.block)
    with torch.no_grad():
        now_NL = token_logps(conditionals(local.learner.engine.policy, part), part)
        reference_NL = token_logps(conditionals(local.learner.reference.network, part), part)
    margin_GC = (now_NL - reference_NL).double().sum(-1).view(-1, 10).numpy()
    pairs = [
        (margin_C[i], margin_C[j])
        for margin_C, reward_C in zip(margin_GC, batch.block.reward_N.reshape(-1, 10))
        for i, j in itertools.permutations(range(10), 2)
        if reward_C[i] > reward_C[j]
    ]
    preferred, dispreferred = np.mean(pairs, axis=0)
    assert abs(preferred - dispreferred) > 1e-3  # three steps away from π_ref
    record, _ = local.learner.consume(batch)
    measures = cells.finish(cells.total(record.cells))
    assert measures[PREFERRED] == pytest.approx(preferred, abs=1e-5)
    assert measures[DISPREFERRED] == pytest.approx(dispreferred, abs=1e-5)


def test_micro_batches_that_cut_groups_leave_it_as_it_is():
    whole, cut = (
        cells.finish(cells.total(last("bandit_rwr", f"learner.micro_batch={size}")[1].cells))
        for size in (20, 7)
    )
    assert cut[PREFERRED] == pytest.approx(whole[PREFERRED], abs=1e-5)
    assert cut[DISPREFERRED] == pytest.approx(whole[DISPREFERRED], abs=1e-5)
