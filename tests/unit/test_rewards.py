"""Rewards by hand, and the law that a reward is a number or a stated failure."""

import asyncio
import math
import pickle
import time

import numpy as np
import pytest

from configs.choices import RewardKind
from configs.schema import RewardConfig
from configs.schema_reward import no_reward
from reward_server.client import Pairs
from reward_server.endpoint import Refusal, parse
from reward_server.rewards import (
    InProcess,
    Scores,
    concatenate,
    describe,
    length,
    load,
    peak,
    score_safely,
)
from reward_server.scorer import Scorer

R1 = RewardConfig()
R2 = RewardConfig(centre=20.0)


def score(reward, *responses):
    return score_safely(reward, [[0]] * len(responses), list(responses))


def test_r1_and_r2_by_hand():
    responses = ([70] * 10, [80, 60], [70, 90], [20])
    e = math.exp
    np.testing.assert_allclose(
        score(load(R1), *responses).reward, [1, e(-1), (1 + e(-4)) / 2, e(-25)], rtol=1e-6
    )
    np.testing.assert_allclose(
        score(load(R2), *responses).reward,
        [e(-25), (e(-36) + e(-16)) / 2, (e(-25) + e(-49)) / 2, 1],
        rtol=1e-6,
    )


def test_the_prompt_does_not_count():
    reward = load(R1)
    assert list(reward([[70], [0]], [[1, 2], [1, 2]])) == list(reward([[9], [9]], [[1, 2], [1, 2]]))


def test_an_empty_response_fails_alone():
    scores = score(load(R1), [70], [], [70, 70])
    np.testing.assert_array_equal(scores.reward, np.float32([1, np.nan, 1]))
    assert list(scores.failures) == [1] and "empty" in scores.failures[1]


@pytest.mark.parametrize("centre, width", [(70, 0), (70, -1), (math.nan, 10), (70, math.inf)])
def test_a_peak_needs_finite_numbers(centre, width):
    with pytest.raises(ValueError, match="reward.width"):
        peak(centre, width)


def test_min_and_mode_length_by_hand():
    responses = ([0], [], [5, 5, 0], [5] * 7, [5, 2, 0, 5, 5])
    kind = RewardKind.length
    shortest = load(RewardConfig(kind=kind, end_tokens=[0, 2]))
    assert score(shortest, *responses).reward.tolist() == [0, 0, -2, -7, -1]
    mode = load(RewardConfig(kind=kind, target=3, scale=2, end_tokens=[0]))
    assert score(mode, *responses).reward.tolist() == [-1.5, -1.5, -0.5, -2, -0.5]
    endless = load(RewardConfig(kind=kind))
    assert score(endless, *responses).reward.tolist() == [-1, 0, -3, -7, -5]


@pytest.mark.parametrize("target, scale", [(math.nan, 1), (0, 0), (0, math.inf)])
def test_a_length_needs_finite_numbers(target, scale):
    with pytest.raises(ValueError, match="reward.scale"):
        length(target, scale, [])


def test_no_responses_are_no_rewards():
    scores = score(load(R1))
    assert scores.reward.dtype == np.float32 and len(scores.reward) == 0 and not scores.failures


def test_only_the_culprits_of_a_raise_fail():
    calls = []

    def reward(prompts, responses):
        calls.append(len(responses))
        if any(13 in response for response in responses):
            raise RuntimeError("thirteen\nis unlucky")
        return [float(response[0]) for response in responses]

    scores = score(reward, *([[i] for i in range(100)]))
    assert scores.failures == {13: "the reward raised RuntimeError: thirteen is unlucky"}
    assert np.isnan(scores.reward[13]) and scores.reward[12] == 12 and scores.reward[99] == 99
    assert len(calls) < 20


def test_a_reward_that_always_raises_or_exits_fails_all():
    def leave(prompts, responses):
        raise SystemExit(3)

    scores = score(leave, [1], [2], [3])
    assert set(scores.failures) == {0, 1, 2} and np.isnan(scores.reward).all()
    assert "SystemExit: 3" in scores.failures[0]


def test_a_wrong_count_fails_all_of_that_call():
    scores = score(lambda prompts, responses: [1.0] * 3, *([[1]] * 10))
    assert set(scores.failures.values()) == {"the reward returned 3 rewards for 10 responses"}
    assert len(scores.failures) == 10 and np.isnan(scores.reward).all()


def test_a_wrong_count_is_isolated_where_it_can_be():
    def dropping(prompts, responses):
        return [1.0 for response in responses if response != [13]]

    scores = score(dropping, *([[i] for i in range(16)]))
    assert list(scores.failures) == [13]
    assert np.nansum(scores.reward) == 15


@pytest.mark.parametrize(
    "value, why",
    [
        (math.nan, "nan, not a finite"),
        (math.inf, "inf, not a finite"),
        (1e39, "1e+39, not a finite"),
        (10**400, "not a finite"),
        (None, "NoneType 'None', not a number"),
        ("1.0", "str '1.0', not a number"),
        ([1.0], "list '[1.0]', not a number"),
        (1j, "complex '1j', not a number"),
    ],
)
def test_what_is_no_finite_number_fails_alone(value, why):
    scores = score(lambda prompts, responses: [0.5, value, 2], [1], [2], [3])
    np.testing.assert_array_equal(scores.reward, np.float32([0.5, np.nan, 2]))
    assert list(scores.failures) == [1] and why in scores.failures[1]


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.int64(1), np.array(1.0)])
def test_numbers_of_every_kind_are_numbers(value):
    assert score(lambda prompts, responses: [value], [1]).reward.tolist() == [1.0]


@pytest.mark.parametrize("answer, kind", [(None, "NoneType"), (1.0, "float"), ("ab", "str")])
def test_an_answer_that_is_no_list_is_stated(answer, kind):
    scores = score(lambda prompts, responses: answer, [1], [2])
    assert set(scores.failures.values()) == {f"the reward returned {kind}, not a list of numbers"}


def test_arrays_and_tensors_are_answers():
    torch = pytest.importorskip("torch")
    for answer in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [torch.tensor(1.0), 2]):
        assert score(lambda prompts, responses, a=answer: a, [1], [2]).reward.tolist() == [1, 2]


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_reward_at_hand.py").write_text(
        "limit = 3\ndef length(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    (tmp_path / "my_broken_reward.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    config = RewardConfig(kind=RewardKind.function, path="my_reward_at_hand:length")
    assert score(load(config), [1, 2], []).reward.tolist() == [2, 0]
    assert describe(config) == "function(my_reward_at_hand:length)"
    for path, why in {
        "": "write it as module:function",
        "my_reward_at_hand": "write it as module:function",
        "my_reward_at_hand:": "write it as module:function",
        "my reward:length": "write it as module:function",
        "no_such_module_anywhere:f": "no module 'no_such_module_anywhere'",
        "my_reward_at_hand:width": "has no 'width'",
        "my_reward_at_hand:limit": "is a int, not a function",
        "my_broken_reward:f": "No module named 'a_module_that_is_not_there'",
    }.items():
        with pytest.raises(ValueError, match="reward.path") as caught:
            load(RewardConfig(kind=RewardKind.function, path=path))
        assert why in str(caught.value)


def test_describe_names_kind_and_parameters():
    assert describe(R1) == "peak(centre=70, width=10)"
    mode = RewardConfig(kind=RewardKind.length, target=7, end_tokens=[0, 2])
    assert describe(mode) == "length(target=7, scale=1, end_tokens=[0, 2])"
    assert describe(no_reward()) == ""


def test_every_score_has_its_scorers_identity(monkeypatch):
    monkeypatch.setattr("reward_server.scorer._cap_threads", lambda threads: None)
    pairs = Pairs.pack([[0]] * 3, [[70], [20], []])
    mode = RewardConfig(kind=RewardKind.length, batch=2)
    (served,) = Scorer(mode, folder="", stall_s=10.0, threads=1)._score_all([pairs])
    asked = InProcess(mode).score(*pairs.unpack())
    assert served.identity == asked.identity == describe(mode)
    assert asked.reward.tolist() == served.reward.tolist() == [-1, -1, 0]
    with pytest.raises(RuntimeError, match="peak.* here, and was length"):
        Scorer(R1, folder="", stall_s=10.0, threads=1, identity=describe(mode))


def test_pairs_keep_a_shared_prompt_once():
    prompts, responses = [[1, 2], [1, 2], [3], [1, 2]], [[4], [], [5, 6], [7]]
    pairs = pickle.loads(pickle.dumps(Pairs.pack(prompts, responses)))
    assert pairs.unpack() == (prompts, responses)
    assert len(pairs) == 4 and pairs.prompt_P.tolist() == [1, 2, 3, 1, 2]
    with pytest.raises(ValueError, match="2 prompts for 1 responses"):
        Pairs.pack([[1], [2]], [[1]])


def test_scores_split_and_join():
    scores = Scores(np.float32([1, np.nan, 3]), {1: "why"}, "me")
    parts = [scores.slice(0, 1), scores.slice(1, 3)]
    assert parts[1].failures == {0: "why"}
    joined = concatenate(parts)
    np.testing.assert_array_equal(joined.reward, scores.reward)
    assert joined.failures == scores.failures and joined.identity == "me"


@pytest.mark.parametrize(
    "body, status, why",
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        (b"\xff", 400, "not valid JSON"),
        (b"[]", 422, "the body must be"),
        (b'{"prompts": []}', 422, "the body must be"),
        (b'{"prompts": 1, "responses": []}', 422, "prompts must be a list"),
        (b'{"prompts": [1], "responses": [[1]]}', 422, "prompts[0] must be a list"),
        (b'{"prompts": [[1]], "responses": [["a"]]}', 422, "responses[0][0] must be an integer"),
        (b'{"prompts": [[1]], "responses": [[true]]}', 422, "responses[0][0] must be an integer"),
        (b'{"prompts": [[-1]], "responses": [[1]]}', 422, "prompts[0][0] must be an integer"),
        (b'{"prompts": [[1]], "responses": [[2147483648]]}', 422, "an integer from 0 to"),
        (b'{"prompts": [[1]], "responses": []}', 422, "1 prompts for 0 responses"),
    ],
)
def test_a_malformed_request_is_told_why(body, status, why):
    with pytest.raises(Refusal) as refusal:
        parse(body)
    assert refusal.value.status == status and why in str(refusal.value)


def test_a_stuck_call_makes_its_replica_unhealthy(monkeypatch):
    monkeypatch.setattr("reward_server.scorer._cap_threads", lambda threads: None)
    scorer = Scorer(R1, folder="", stall_s=10.0, threads=1)
    asyncio.run(scorer.check_health())
    scorer.called_at = time.monotonic() - 11
    with pytest.raises(RuntimeError, match="has not returned for 10 s"):
        asyncio.run(scorer.check_health())
