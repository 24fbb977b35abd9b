"""Law 3 at each publish: learner and engine score the same text, and a forgotten update shows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import policy, probe
from actors.rollout import Version
from cluster.books import Books
from learner import cells
from learner.cells import StepRecord
from tests.harness import Local, new_queue, settings

PIPELINED = ("bandit_pipelined", "learner.updates=8", "learner.lr=1e-4", "replay.lag=1")


def test_the_statistic_equals_its_numpy_reference_and_is_0_only_where_scores_agree():
    generator = np.random.default_rng(0)
    engine_NL = generator.normal(-4.0, 1.0, (4, 10)).astype(np.float32)
    learner_NL = engine_NL + generator.normal(0.0, 0.5, (4, 10)).astype(np.float32)
    ratio_NL = np.exp(learner_NL.astype(float)) / np.exp(engine_NL.astype(float))
    expected = np.mean(ratio_NL - 1.0 - np.log(ratio_NL))
    assert probe.mismatch(engine_NL, learner_NL) == pytest.approx(expected)
    assert probe.mismatch(engine_NL, engine_NL) == 0.0
    assert probe.mismatch(engine_NL, engine_NL + 1e-3) == pytest.approx(0.5e-6, rel=0.01)
    for worst in (np.nan, -np.inf):
        learner_NL[2, 3] = worst
        assert 1.0 < probe.mismatch(engine_NL, learner_NL) < np.inf


def test_the_text_is_keyed_by_the_seed_and_fits_the_policy_and_its_engine():
    config = settings("bandit")
    shape = policy.architecture(config)
    vocabulary, context = shape.vocab_size, policy.context(config, shape)
    text_NT = probe.text(config.seed, vocabulary, context)
    assert text_NT.shape == (4, 11) and text_NT.min() >= 0 and text_NT.max() < vocabulary
    assert (probe.text(0, vocabulary, context) == text_NT).all()
    assert (probe.text(1, vocabulary, context) != text_NT).any()
    short = settings("bandit", "prompts.max_tokens=1", "rollout.max_tokens=3")
    tight = policy.context(short, shape)
    assert (probe.text(0, vocabulary, tight) == text_NT[:, :3]).all()


def test_a_context_too_short_for_a_probe_leaves_it_out():
    local = Local(settings("bandit", "learner.updates=1"))
    tight = settings("bandit", "prompts.max_tokens=1", "rollout.max_tokens=1")
    context = policy.context(tight, policy.architecture(tight))
    local.learner._probe_NT = probe.text(0, 100, context)
    assert local.learner.probe() is None
    local.queue.publish(Version(0, 0), [local.learner.weights().copy(), None])
    (record,) = local.steps(1)
    assert record.queue["engine_mismatch_probe"] is None


def test_the_torch_engines_scores_are_the_learners():
    local = Local(settings("bandit_reinforce", "learner.updates=3"))
    for _ in local.steps(3):
        sent = local.learner.probe()
        engine = local.actors[0].engine
        engine.load(local.learner.weights(), local.learner.version)
        assert np.abs(engine.score(sent.text_NT) - sent.logp_NL).max() <= 1e-5
        assert local.learner.engine.engine.module.training


def records_of(broken: bool) -> list[StepRecord]:
    """A pipelined run; `broken` weights are announced and never loaded."""
    local = Local(settings(*PIPELINED))
    for actor in local.actors:
        load = actor.engine.load

        def forgets(
            weights: np.ndarray, version: Version, engine: Any = actor.engine, load: Any = load
        ) -> None:
            if version.step and broken:
                engine.version = version
            else:
                load(weights, version)

        actor.engine.load = forgets
    return list(local.steps(8))


def alarm(records: list[StepRecord]) -> tuple[int, list[str]]:
    """Alarms counted, and what was said, over metrics lines of these steps."""
    said: list[str] = []
    books: Any = SimpleNamespace(
        config=settings(*PIPELINED),
        tally=SimpleNamespace(mismatches=0),
        say=said.append,
    )
    for record in records:
        kl = cells.engine_mismatch(record.cells)
        line = {"step": record.version.step, "engine_mismatch_kl": kl, **record.queue}
        Books._check_mismatch(books, {name: v for name, v in line.items() if v is not None})
    return books.tally.mismatches, said


def test_a_forgotten_update_trips_the_alarm_of_a_pipelined_run_without_age_0_tokens():
    good, bad = records_of(broken=False), records_of(broken=True)
    for records in (good, bad):
        assert all(0 not in {age for age, _ in record.cells} for record in records[1:])
    limit = settings(*PIPELINED).limits.engine_mismatch_kl
    floor = [record.queue["engine_mismatch_probe"] for record in good]
    assert max(nats for nats in floor if nats is not None) < limit / 100
    assert alarm(good) == (0, [])
    count, (message,) = alarm(bad)
    assert count >= 1 and message.startswith("WEIGHTS DID NOT ARRIVE: engine_mismatch_probe ")


def test_a_batch_takes_the_largest_mismatch_since_the_last_was_frozen_also_over_a_skip():
    local = Local(settings("bandit", "learner.updates=4"))
    queue = local.queue = new_queue(local.config)
    queue.publish(Version(0, 0), [local.learner.weights().copy()])
    local.actors[0].queue.queue = queue
    local.generate()
    for nats in (None, 0.25, 0.5, 0.125):
        queue.probed(nats)

    def frozen(number: int) -> float | None:
        return queue.get(0, number, 0).measures["engine_mismatch_probe"]

    assert frozen(0) == frozen(0) == 0.5
    queue.commit(0, 0, 0, True)
    assert frozen(1) is None
    queue.probed(0.25)
    assert frozen(2) == 0.25
    queue.commit(0, 1, 0, False)
    assert frozen(2) == 0.25
    queue.commit(0, 2, 0, False)
    assert frozen(3) == 0.25
