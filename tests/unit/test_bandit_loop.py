"""The bare loop beside which `bench bandit` puts the system does the system's work: on the same
rollouts its loss, gradients and measures are the learner's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.rollout import Rollouts, offsets
from benchmarks.bandit_loop import BareLoop, Samples, loss, measures
from cluster import inputs
from learner import cells
from learner.batch import conditionals, pad, token_logps
from learner.measures import measure
from learner.objectives import load
from learner.signals import signals
from tests.harness import settings

OBJECTIVES = {"ipo": "bandit", "best_of_n": "bandit_best_of_n"}


@pytest.fixture(scope="module", params=OBJECTIVES)
def loop(request) -> BareLoop:
    config = settings(OBJECTIVES[request.param], "replay.samples_per_round=20",
                      "learner.minibatch=20", "eval.samples=20", "eval.every=2")  # fmt: skip
    prompts = inputs.prompts(config)
    return BareLoop(config, [int(prompts[position].ids[0]) for position in range(10)])


def _block(samples: Samples, logp_NL: Tensor) -> Rollouts:
    """The same rollouts as the queue's record, 10 to a group."""
    n, length = samples.token_NL.shape
    return Rollouts(
        members=10,
        position_G=np.arange(n // 10), incarnation_G=np.zeros(n // 10, dtype=np.int32),
        row_G=np.arange(n // 10), prompt_offset_G1=offsets([1] * (n // 10)),
        prompt_P=samples.prompt_N1[::10, 0].numpy().astype(np.int32),
        offset_N1=offsets([length] * n),
        token_K=samples.token_NL.numpy().ravel().astype(np.int32),
        logp_K=logp_NL.numpy().ravel(),
        lineage_K=np.zeros(n * length, dtype=np.int16),
        step_K=np.zeros(n * length, dtype=np.int32),
        reward_N=samples.reward_N.numpy(), status_N=np.zeros(n, dtype=np.uint8),
        truncated_N=np.zeros(n, dtype=bool), label_N=np.full(n, -1, dtype=np.int8),
        scorer_N=np.zeros(n, dtype=np.uint8),
    )  # fmt: skip


def test_the_bare_loops_loss_gradients_and_measures_are_the_learners(loop):
    config = loop.config
    samples = loop.sample(2)
    loop.update(samples)  # off π_gen
    logp_NL = samples.generator_NLV.gather(-1, samples.token_NL[..., None])[..., 0]
    batch = pad(_block(samples, logp_NL))
    notes = signals(samples.reward_N.numpy(), np.full(20, -1), np.ones(20, dtype=bool), 10,
                    samples.reward_N.numpy(), config.objective, 0.0)  # fmt: skip
    objective = load(config.objective.name)

    def gradients(value: Tensor) -> list[Tensor]:
        return torch.autograd.grad(value, list(loop.model.parameters()))

    now_NLV = conditionals(loop.model, batch)
    logp_now_NL = token_logps(now_NLV, batch)
    logp_now_NL.retain_grad()
    given = notes.loss_inputs(
        logp_now_NL, batch.mask_NL, batch.logp_NL, token_logps(samples.reference_NLV, batch)
    )
    ours = objective.loss(given, config.objective) / notes.count(objective.traits.per)
    bare_NLV = loop.distributions(loop.model, samples.prompt_N1, samples.token_NL)
    theirs = loss(bare_NLV, samples, config)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(theirs), gradients(ours)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    given.logp_NL = logp_now_NL.detach()
    three = (now_NLV.detach(), samples.generator_NLV, samples.reference_NLV)
    table = measure(given, torch.zeros_like(logp_NL), np.zeros(20, dtype=int),
                    np.ones(20, dtype=int), three, config.objective)  # fmt: skip
    expected = cells.finish(cells.total(table))
    found = measures(bare_NLV.detach(), samples)
    assert found["kl_to_generator"] > 1e-4, "the step moved the policy"
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-4)


def test_the_bare_loop_evaluates_as_often_as_the_system_and_learns(loop):
    before, steps = len(loop.evaluated), len(loop.measured)
    loop.run(3)
    assert len(loop.evaluated) - before == 3, "at the start, after the second and the last"
    assert len(loop.measured) - steps == loop.taken == 3
    assert set(loop.evaluated[-1]) == {"reward_eval", "reward_eval_error", "eval_kl_to_reference"}
