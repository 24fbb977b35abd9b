"""The model of overlap: what it must say where the answer is known, and the laws that it keeps."""

import numpy as np
import pytest

from benchmarks.overlap_model import Cluster, System, at_scale, simulate


def system(generation: float, training: float, max_age: int | None, **more: int) -> System:
    """Rounds of 4 leases by one actor, S = 1 unless said, seconds per round and step."""
    settings = {"leases": 4, "batches": 1, "actors": 1, **more}
    return System(
        lease=lambda n: generation / settings["leases"], step=lambda n: training,
        max_age=max_age, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("generation", "training"), [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)])
def test_lockstep_takes_the_sum_and_pipelined_the_longer_of_both_stages(generation, training):
    lockstep = simulate(system(generation, training, None), 50)
    assert lockstep.step_seconds == pytest.approx(generation + training)
    assert lockstep.actor_idle == pytest.approx(training / (generation + training), abs=0.02)
    assert lockstep.learner_idle == pytest.approx(generation / (generation + training), abs=0.02)
    assert lockstep.ages == (0, 0)
    pipelined = simulate(system(generation, training, 2), 50, warm=5)
    longer = max(generation, training)
    assert pipelined.step_seconds == pytest.approx(longer)
    assert pipelined.actor_idle == pytest.approx(1 - generation / longer, abs=0.05)
    assert pipelined.learner_idle == pytest.approx(1 - training / longer, abs=0.05)


def test_a_budget_of_0_is_lockstep_and_ages_stay_within_the_budget():
    assert simulate(system(1, 1, 0), 30).step_seconds == pytest.approx(2.0)
    for budget in (1, 2, 5):
        assert simulate(system(0.1, 1, budget), 40, warm=10).ages == (budget, budget)
    with pytest.raises(ValueError, match="less than S - 1"):
        simulate(system(1, 1, 2, batches=4), 10)


def test_lockstep_ages_are_0_to_s_minus_1_with_several_steps_a_round():
    assert simulate(system(1, 1, None, batches=4), 10).ages == (0, 3)
    assert simulate(system(1, 0.25, 7, batches=4), 40, warm=10).step_seconds == pytest.approx(0.25)


def test_actors_share_a_rounds_leases_until_the_learner_is_what_is_slow():
    steps = [simulate(system(4, 1, 2, actors=n), 60, warm=6).step_seconds for n in (1, 2, 4, 8)]
    assert steps == pytest.approx([4, 2, 1, 1], rel=0.02)


def test_publishing_delays_lockstep_twice_a_round_and_pipelined_rounds_not_at_all():
    def with_delay(max_age: int | None) -> System:
        return System(
            leases=1, batches=1, actors=1, lease=lambda n: 1.0, step=lambda n: 1.0,
            max_age=max_age, publish=0.1,
        )  # fmt: skip

    assert simulate(with_delay(None), 40).step_seconds == pytest.approx(2.2)
    assert simulate(with_delay(2), 40, warm=5).step_seconds == pytest.approx(1.0)


def test_without_a_tail_a_split_cluster_gains_2_and_with_one_a_larger_budget_gains_more():
    even = at_scale(Cluster(sigma=0.0, publish=0.0), 2, rounds=12)
    assert even.over_split == pytest.approx(2.0, rel=0.02)
    assert even.over_colocated == pytest.approx(1.0, rel=0.02)
    tailed = [at_scale(Cluster(), age, rounds=16) for age in (1, 4)]
    assert tailed[1].over_split > tailed[0].over_split > 1.5
    assert all(got.age <= age for got, age in zip(tailed, (1, 4)))
    assert np.isfinite([got.learner_idle for got in tailed]).all()
