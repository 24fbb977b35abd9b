"""What a minibatch's rewards and labels become, against NumPy and at the edges."""

import numpy as np
import pytest
import torch

from configs.schema import ObjectiveConfig
from learner.signals import Signals, signals

torch.set_num_threads(1)


def make_signals(
    reward: list[float],
    label: list[int] | None = None,
    valid: list[bool] | None = None,
    members: int = 4,
    round_rewards: list[float] | None = None,
    progress: float = 0.0,
) -> Signals:
    return signals(
        np.array(reward, dtype=np.float32),
        np.full(len(reward), -1, dtype=np.int8) if label is None else np.array(label, np.int8),
        np.ones(len(reward), dtype=bool) if valid is None else np.array(valid),
        members,
        np.array(reward if round_rewards is None else round_rewards, dtype=np.float32),
        ObjectiveConfig(quantile_start=0.5, quantile_end=0.9),
        progress,
    )


def test_signals_equal_numpy_reference() -> None:
    draw = np.random.default_rng(3)
    reward, label = draw.uniform(0, 1, 12), draw.integers(0, 2, 12)
    valid = np.ones(12, dtype=bool)
    valid[[2, 7]], reward[[2, 7]], label[[2, 7]] = False, np.nan, 1
    reward[9] = reward[8]  # a tie
    rounds = [*reward, 2.0, 3.0, 0.5]
    s = make_signals(list(reward), list(label), list(valid), round_rewards=rounds, progress=0.25)
    known = np.array([r for r in rounds if not np.isnan(r)])
    group = [[j for j in range(i // 4 * 4, i // 4 * 4 + 4) if valid[j]] for i in range(12)]
    expected = {
        "valid_N": valid,
        "reward_N": reward,
        "standardised_N": (reward - known.mean()) / known.std(ddof=1),
        "leave_one_out_N": [
            reward[i] - np.mean([reward[j] for j in group[i] if j != i]) for i in range(12)
        ],
        "score_N": reward,
        "best_N": [i == max(group[i], key=lambda j: reward[j]) for i in range(12)],
        "good_N": valid & (label == 1),
        "selected_N": reward >= np.quantile(known, 0.6),
    }
    for name, column in expected.items():
        np.testing.assert_allclose(getattr(s, name), column, rtol=1e-5, atol=1e-6, err_msg=name)
        assert getattr(s, name).dtype in (torch.float32, torch.bool)
    assert s.count("rollout") == 10 and s.count("group") == 3
    assert s.count("pair") == 3 + 3 + 5  # two groups lost a member, the third has a tie
    for per in ("selected", "good"):
        assert 0 < s.count(per) == expected[f"{per}_N"].sum() < 10


def test_standardised_is_zero_for_equal_rewards_and_for_a_single_one() -> None:
    equal = make_signals([0.1] * 8)  # 0.1 is no binary number: mean and σ come out rounded
    assert equal.standardised_N.tolist() == [0.0] * 8 and equal.count("pair") == 0
    single = make_signals([0.7], members=1)
    assert single.standardised_N.tolist() == [0.0] and single.leave_one_out_N.tolist() == [0.0]


def test_quantile_rises_with_progress() -> None:
    rewards = [float(i) for i in range(10)] + [np.nan, np.nan]
    valid = [True] * 10 + [False] * 2
    assert make_signals(rewards, valid=valid, progress=0.0).count("selected") == 5
    assert make_signals(rewards, valid=valid, progress=0.5).count("selected") == 3
    assert make_signals(rewards, valid=valid, progress=1.0).count("selected") == 1


def test_labels_rank_where_rewards_are_absent_and_never_mix_with_them() -> None:
    nan = float("nan")
    s = make_signals(
        [nan, nan, nan, 0.4, 0.6, 0.5, nan, nan, nan],
        label=[0, 1, -1, 1, 0, -1, -1, -1, -1],
        valid=[True] * 9,
        members=3,
    )
    assert s.best_N.tolist() == [False, True, False] + [False, True, False] + [False] * 3
    assert s.count("pair") == 1 + 3 and s.count("group") == 2 and s.count("good") == 2
    mixed = make_signals([nan, 0.9, 0.1], label=[1, 0, 0], members=3)
    assert mixed.score_N.tolist() == [1.0, 0.0, 0.0]


def test_first_of_equals_is_best_and_failed_members_never_are() -> None:
    s = make_signals([0.3, 0.8, 0.8, 9.0], valid=[True, True, True, False])
    assert s.best_N.tolist() == [False, True, False, False]
    assert torch.isnan(s.reward_N[3])
    with pytest.raises(ValueError, match="whole groups"):
        make_signals([0.1, 0.2, 0.3])


def test_rows_are_the_slice_of_every_column() -> None:
    s = make_signals([0.1, 0.9, 0.3, 0.5, 0.5, 0.2, 0.8, 0.4])
    part = s.take(np.arange(4, 8))
    assert part.best_N.tolist() == [False, False, True, False] and part.count("pair") == 6
    torch.testing.assert_close(part.standardised_N, s.standardised_N[4:])  # still the round's
    assert s.take(np.arange(4)).count("pair") + part.count("pair") == s.count("pair")


def test_a_reward_at_the_quantile_is_selected() -> None:
    assert make_signals([0.1, 0.2, 0.3], members=1).selected_N.tolist() == [False, True, True]
    assert make_signals([0.1] * 3, members=1).count("selected") == 3
