"""The reward service on real Ray Serve: the handle, batching, failures, replicas."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import ray
from ray import serve

from configs.choices import RewardKind
from configs.schema import RewardConfig
from reward_server.rewards import describe, load, score_safely
from reward_server.service import deploy
from tests.rewards import save_model

ODD_REWARD = """
import os, time

def score(prompts, responses):
    if [13] in responses:
        raise RuntimeError("thirteen")
    if [14] in responses:
        time.sleep(4)
    if [15] in responses:
        os._exit(1)
    time.sleep(0.1)
    return [os.getpid() if prompt == [1] else len(prompts) for prompt in prompts]
"""


@pytest.fixture(scope="module")
def peak_service(ray_cluster):
    with deploy(RewardConfig(), name="peak") as service:
        yield service


@pytest.fixture(scope="module")
def odd_service(peak_service, tmp_path_factory):
    """A reward of the user's own, in the current folder, on two replicas of a second app."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "odd_reward.py").write_text(ODD_REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        kind = RewardKind.function
        config = RewardConfig(kind=kind, path="odd_reward:score", replicas=2, batch=50)
        service = deploy(config, name="odd")
    with service:
        yield service


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def model_service(ray_cluster, model_folder):
    """A reward model on two replicas; its folder may be changed after the tests that score."""
    config = RewardConfig(kind=RewardKind.model, path=str(model_folder), replicas=2, batch=8)
    with deploy(config, name="model") as service:
        yield service, config


def leases(count):
    draw = np.random.default_rng(0)
    return [([[i // 10] for i in range(100)], draw.integers(0, 100, (100, 10)).tolist())
            for _ in range(count)]  # fmt: skip


def test_a_wrong_setting_stops_before_anything_starts():
    with pytest.raises(ValueError, match="no module"):
        deploy(RewardConfig(kind=RewardKind.function, path="no_such_module_anywhere:f"))


def test_the_handle_scores_as_a_direct_call_does(peak_service):
    for prompts, responses in leases(3):
        got = peak_service.client.score(prompts, responses, timeout_s=10)
        want = score_safely(load(RewardConfig()), prompts, responses)
        np.testing.assert_array_equal(got.reward, want.reward)
        assert got.reward.dtype == np.float32 and not got.failures
    assert peak_service.client.describe(timeout_s=10) == "peak(centre=70, width=10)"
    assert len(peak_service.client.score([], [], timeout_s=10).reward) == 0


def test_an_idle_service_answers_in_milliseconds(peak_service):
    ((prompts, responses),) = leases(1)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        peak_service.client.score(prompts, responses, timeout_s=10)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.05


def test_a_client_travels_into_an_actor(peak_service):
    @ray.remote(num_cpus=0)
    class Caller:
        def score(self, client):
            return client.score([[0]] * 2, [[70], []], timeout_s=20)

    scores = ray.get(Caller.remote().score.remote(peak_service.client), timeout=30)
    np.testing.assert_array_equal(scores.reward, np.float32([1, np.nan]))
    assert "empty" in scores.failures[1]


def test_clients_of_one_service_share_a_handle_in_a_process_and_others_do_not(
    peak_service, odd_service
):
    @ray.remote(num_cpus=0)
    class Process:
        def take(self, client):
            return id(client.handle)

    process = Process.remote()
    sent = [peak_service.client, odd_service.client, peak_service.client]
    first, other, again = ray.get([process.take.remote(client) for client in sent], timeout=30)
    assert first == again != other


def test_an_event_loop_is_not_blocked(peak_service):
    import asyncio

    async def wrong():
        peak_service.client.score([[0]], [[1]], timeout_s=1)

    with pytest.raises(RuntimeError, match="to_thread"):
        asyncio.run(wrong())


def test_concurrent_requests_share_calls_up_to_the_limit(odd_service):
    together = Barrier(12)

    def ask(_):
        together.wait(20)
        return odd_service.client.score([[0]] * 20, [[1]] * 20, timeout_s=20).reward

    sizes = np.zeros(1)
    with ThreadPoolExecutor(12) as pool:
        for _ in range(10):  # whether two meet is the scheduler's to say: seldom ten times not
            sizes = np.concatenate([sizes, *pool.map(ask, range(12))])
            assert sizes.max() <= 50, "a call was over reward.batch"
            if sizes.max() > 20:
                return
    raise AssertionError("no two requests shared a call")


def test_both_replicas_score(odd_service):
    def ask(_):
        return odd_service.client.score([[1]], [[1]], timeout_s=20).reward[0]

    with ThreadPoolExecutor(12) as pool:
        assert len(set(pool.map(ask, range(24)))) == 2


def test_a_raising_function_fails_the_culprit_only(odd_service):
    scores = odd_service.client.score([[0]] * 3, [[1], [13], [2]], timeout_s=20)
    assert scores.failures == {1: "the reward raised RuntimeError: thirteen"}
    assert np.isnan(scores.reward).tolist() == [False, True, False]


def test_no_answer_in_time_is_a_stated_failure_of_all(odd_service):
    start = time.monotonic()
    scores = odd_service.client.score([[0]] * 2, [[1], [14]], timeout_s=0.5)
    assert time.monotonic() - start < 3
    assert set(scores.failures.values()) == {"reward service 'odd': no answer for 0.5 s"}
    assert np.isnan(scores.reward).all() and len(scores.failures) == 2


def test_lost_replicas_are_a_stated_failure_and_come_back(odd_service):
    scores = odd_service.client.score([[0]] * 2, [[1], [15]], timeout_s=3)
    assert len(scores.failures) == 2 and "reward service 'odd'" in scores.failures[0]
    assert not odd_service.client.score([[0]], [[1]], timeout_s=30).failures


def test_replicas_of_a_reward_model_agree_and_sign_their_scores(model_service):
    service, config = model_service
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 100, draw.integers(1, 20)).tolist() for _ in range(40)]
    responses = [draw.integers(0, 100, draw.integers(0, 40)).tolist() for _ in range(40)]
    want = load(config)(prompts, responses)

    def ask(turn):
        order = np.random.default_rng(turn).permutation(40)[: turn + 5]
        got = service.client.score(
            [prompts[i] for i in order], [responses[i] for i in order], timeout_s=30
        )
        np.testing.assert_allclose(got.reward, want[order], atol=1e-5)
        return got.identity

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(ask, range(24))) == {describe(config)}
    assert np.ptp(want) > 1
    assert service.client.describe(timeout_s=10) == describe(config)


def test_a_replica_with_other_files_than_at_the_start_does_not_score(model_service, model_folder):
    service, _ = model_service
    save_model(model_folder, seed=1)
    named = ray.util.list_named_actors(all_namespaces=True)
    replicas = [actor for actor in named if "::model#Scorer#" in actor["name"]]
    assert len(replicas) == 2
    for actor in replicas:
        ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
    deadline, said = time.monotonic() + 120, ""
    while "at the run's start" not in said:  # what new replicas die of, again and again
        assert time.monotonic() < deadline, said
        said = serve.status().applications["model"].deployments["Scorer"].message
        time.sleep(0.2)
    scores = service.client.score([[1]], [[2]], timeout_s=2)
    assert len(scores.failures) == 1 and not scores.identity
