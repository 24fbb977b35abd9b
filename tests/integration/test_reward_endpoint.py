"""Who may talk to the reward service's ports: HTTP with a token, a replica's gRPC with Ray's."""

import json
import os
import socket
import stat
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
from ray._raylet import AuthenticationTokenLoader

from configs.schema import RewardConfig
from reward_server.service import deploy
from tests.harness import free_port

LIMIT = 20_000  # bytes of a request
REFUSED_WITHIN = 1.0  # seconds


@pytest.fixture(scope="module")
def peak_service(ray_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ONPOLICY_REWARD_TOKEN", raising=False)
        config = RewardConfig(port=free_port(), max_request_bytes=LIMIT)
        with deploy(config, name="endpoint") as service:
            yield service


@pytest.fixture(scope="module")
def http(peak_service):
    with open(peak_service.token_file) as file:
        headers = {"Authorization": f"Bearer {file.read()}"}
    with httpx.Client(base_url=peak_service.url, headers=headers, trust_env=False) as client:
        yield client


def test_a_port_in_use_is_refused(ray_cluster):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="reward.port=.* in use"):
            deploy(RewardConfig(port=taken.getsockname()[1]))


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
    replicas = [p for p in every if "Replica:endpoint:Scorer" in " ".join(p.info["cmdline"] or [])]
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
