"""The reward service on real Ray Serve: the handle, batching, failures, replicas, HTTP."""

import json
import os
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray._raylet import AuthenticationTokenLoader

from configs.choices import RewardKind
from configs.schema import RewardConfig
from reward_server.rewards import describe, load, score_safely
from reward_server.service import deploy
from tests.rewards import save_model

LIMIT = 20_000  # bytes of a request
REFUSED_WITHIN = 1.0  # seconds
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def peak_service(ray_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ONPOLICY_REWARD_TOKEN", raising=False)
        config = RewardConfig(port=free_port(), max_request_bytes=LIMIT)
        with deploy(config, name="peak") as service:
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
def http(peak_service):
    with open(peak_service.token_file) as file:
        headers = {"Authorization": f"Bearer {file.read()}"}
    with httpx.Client(base_url=peak_service.url, headers=headers, trust_env=False) as client:
        yield client


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


def test_a_port_in_use_is_refused(ray_cluster):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="reward.port=.* in use"):
            deploy(RewardConfig(port=taken.getsockname()[1]))


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
    def ask(_):
        return odd_service.client.score([[0]] * 20, [[1]] * 20, timeout_s=20).reward

    with ThreadPoolExecutor(12) as pool:
        sizes = np.concatenate(list(pool.map(ask, range(12))))
    assert sizes.max() > 20, "no two requests shared a call"
    assert sizes.max() <= 50, "a call was over reward.batch"


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


def test_http_scores(http, peak_service):
    answer = http.post("/score", json={"prompts": [[0], [0]], "responses": [[70, 80], []]})
    assert answer.status_code == 200
    body = answer.json()
    assert body["rewards"] == [pytest.approx((1 + np.exp(-1)) / 2, abs=1e-6), None]
    assert list(body["failures"]) == ["1"] and "empty" in body["failures"]["1"]
    assert body["identity"] == "peak(centre=70, width=10)"
    health = httpx.get(f"{peak_service.url}/health", trust_env=False)
    assert health.status_code == 200 and health.json()["status"] == "ok"


def test_the_token_lies_in_a_file_of_this_user_only(peak_service):
    assert stat.S_IMODE(os.stat(peak_service.token_file).st_mode) == 0o600
    assert peak_service.token_file in peak_service.notice


def test_http_listens_on_loopback_only(peak_service):
    port = int(peak_service.url.rsplit(":", 1)[1])
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            pytest.skip("needs Linux's /proc/net")
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == port:
                listening.add(local.split(":")[0])
    assert listening == {"0100007F"}


def answer(address: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
    """How a gRPC server answers a call like those of Serve's handles, an empty one."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as answered:
            ask(b"", metadata=metadata, timeout=REFUSED_WITHIN)
    code: grpc.StatusCode = answered.value.code()
    return code


def test_a_replicas_grpc_refuses_who_lacks_rays_token_before_it_unpickles(peak_service):
    every = psutil.process_iter(["cmdline"])
    replicas = [p for p in every if "Replica:peak:Scorer" in " ".join(p.info["cmdline"] or [])]
    opened = [one for p in replicas for one in p.net_connections("tcp") if one.status == "LISTEN"]
    addresses = [f"localhost:{one.laddr.port}" for one in opened]
    answers = {address: answer(address) for address in addresses}
    # Of Ray's own port the method is unknown.
    (mine,) = [a for a, code in answers.items() if code != grpc.StatusCode.UNIMPLEMENTED]
    assert answers[mine] == grpc.StatusCode.UNAUTHENTICATED
    assert answer(mine, ("authorization", "Bearer " + "0" * 64)) == answers[mine]
    header = AuthenticationTokenLoader.instance().get_token_for_http_header()
    token = [(key.lower(), value) for key, value in header.items()]
    assert answer(mine, *token) == grpc.StatusCode.UNKNOWN  # let in: an empty pickle's EOFError


GOOD = json.dumps({"prompts": [[0]], "responses": [[70]]}).encode()


def large_without_end():
    for _ in range(10_000):
        yield b" " * 1000


@pytest.mark.parametrize(
    "status, request_",
    [
        (401, {"content": GOOD, "headers": {"Authorization": ""}}),
        (401, {"content": GOOD, "headers": {"Authorization": "Bearer wrong"}}),
        (401, {"content": GOOD, "headers": {"Authorization": b"Bearer \xc3\xa9"}}),
        (401, {"content": b" " * 5_000_000, "headers": {"Authorization": "Bearer wrong"}}),
        (413, {"content": b" " * (LIMIT + 1)}),
        (413, {"content": b" " * 5_000_000}),
        (413, {"content": large_without_end}),
        (400, {"content": b"{not json"}),
        (422, {"content": b'{"prompts": [[0]], "responses": [[-1]]}'}),
        (422, {"content": b'{"prompts": [[0]], "responses": []}'}),
        (404, {"content": GOOD, "url": "/other"}),
        (405, {"method": "GET"}),
    ],
)
def test_http_refuses_within_a_second(http, status, request_):
    request_ = {"method": "POST", "url": "/score", **request_}
    if callable(request_.get("content")):
        request_["content"] = request_["content"]()
    start = time.monotonic()
    answer = http.request(**request_)
    assert time.monotonic() - start < REFUSED_WITHIN
    assert answer.status_code == status and len(answer.json()["error"]) > 5
    assert http.post("/score", content=GOOD).json()["rewards"] == [1.0]
