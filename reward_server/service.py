"""The reward service: a Ray Serve app of scorers, and a loopback HTTP endpoint if a port is set.

    with deploy(config) as service:
        scores = service.client.score(prompts, responses, timeout_s=30)

Serve's settings belong to the whole Ray cluster and hold from its first app on. The HTTP proxy is
Serve's own (uvicorn), which binds to the address that it is given; HAProxy, which Serve has as a
switch, opens a statistics port on every address and is refused here.
"""

import contextlib
import json
import logging
import os
import socket
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from configs.schema import RewardConfig
from reward_server.client import RewardClient
from reward_server.endpoint import Endpoint, token
from reward_server.rewards import brief, check, describe
from reward_server.scorer import MOST_REQUESTS, Scorer

HOST = "127.0.0.1"
POLL_SECONDS = 0.05
ROUTE_SECONDS = 15.0  # until the HTTP proxy must know the route of an app that runs

log = logging.getLogger(__name__)

_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_OPTIONS: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    "max_queued_requests": 256,  # per caller; over it a call is shed, and tried again
    "max_ongoing_requests": 2 * MOST_REQUESTS,  # one batch being scored, the next one waiting
    "max_constructor_retry_count": 2,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 5.0,
}


@dataclass
class RewardService:
    """A running reward service. Whoever deployed it shuts it down."""

    name: str
    client: RewardClient
    url: str = ""  # of the HTTP endpoint; empty: there is none
    token_file: str = ""  # holds the token if we made it, readable by this user only

    @property
    def notice(self) -> str:
        """For people: where the HTTP endpoint is and how to get its token; empty without one."""
        if not self.url:
            return ""
        secret = f"$(cat {self.token_file})" if self.token_file else "<the token you set>"
        return f"reward endpoint: POST {self.url}/score with Authorization: Bearer {secret}"

    def shutdown(self, cluster_too: bool = False) -> None:
        """Remove the app, and Serve with it if it has no other app. Harmless a second time.

        With `cluster_too` the caller ends the Ray cluster next, which takes the app along: this
        then saves two seconds, and Ray's complaints about them.
        """
        _remove(self.name, self.token_file, only_file=cluster_too)

    def __enter__(self) -> "RewardService":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def deploy(
    config: RewardConfig,
    name: str = "reward",
    timeout_s: float = 120.0,
    stall_s: float = 120.0,
    threads: int = 1,
    actor_options: dict[str, Any] | None = None,
) -> RewardService:
    """Start the reward service as the Serve app `name` on the Ray cluster we are connected to.

    A scorer whose reward does not return for `stall_s` seconds is replaced. actor_options: of each
    scorer, `num_gpus`, `label_selector` and the like. ValueError: a wrong setting, before anything
    starts. RuntimeError: it did not start, with the reason. TimeoutError:
    it did not start within `timeout_s` seconds. After an error none of its replicas is left.
    """
    check(config, os.getcwd())  # a wrong setting stops here, in one line
    deadline = time.monotonic() + timeout_s
    _remove(name)  # left over from a driver that was killed
    digest, token_file = token(config) if config.port else (b"", "")
    try:
        start_serve(config.port)
        scorer = _scorer(config, stall_s, threads, actor_options or {})
        app = _app(config, name, digest, scorer)
        route = "/" if config.port else None
        targets = [serve.RunTarget(app, name, route, _LOGGING)]
        serve.run_many(targets, wait_for_applications_running=False)
        _wait_until_running(name, deadline)
        if config.port:
            _wait_for_route(config.port, name, min(deadline, time.monotonic() + ROUTE_SECONDS))
        # Over gRPC: a quarter faster, and through Ray's objects a caller grows by some 200
        # bytes a call (Ray 2.60).
        handle = serve.get_deployment_handle("Scorer", name).options(_by_reference=False)
        client = RewardClient(handle, name)
    except BaseException:
        _remove(name, token_file)
        raise
    url = f"http://{HOST}:{config.port}" if config.port else ""
    return RewardService(name, client, url, token_file)


def _scorer(
    config: RewardConfig, stall_s: float, threads: int, actor_options: dict[str, Any]
) -> serve.Application:
    options = _OPTIONS | {"ray_actor_options": {"num_cpus": 0} | actor_options}
    deployment = serve.deployment(name="Scorer", num_replicas=config.replicas, **options)(Scorer)
    return deployment.bind(config, os.getcwd(), stall_s, threads, describe(config))


def _app(
    config: RewardConfig, name: str, digest: bytes, scorer: serve.Application
) -> serve.Application:
    if not config.port:
        return scorer
    endpoint = serve.deployment(name="Endpoint", **_OPTIONS)(Endpoint)
    return endpoint.bind(scorer, name, digest, config.max_request_bytes)


def start_serve(port: int) -> None:
    """Start Serve unless this cluster has it: without HTTP, or with it on loopback's `port`."""
    if not port:
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        return
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        raise ValueError(
            f"reward.port={port}: unset RAY_SERVE_ENABLE_HA_PROXY, HAProxy listens beyond loopback"
        )
    if not serve.status().proxies:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise ValueError(f"reward.port={port}: {error.strerror}; take another") from None
    http = {"host": HOST, "port": port}
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_LOGGING)
    if not serve.status().proxies:
        raise RuntimeError(
            f"reward.port={port}: this cluster's Serve was started before without HTTP; "
            "set reward.port=0 or shut it down"
        )


def _wait_until_running(name: str, deadline: float) -> None:
    while True:
        app = serve.status().applications.get(name)
        if app and app.status == ApplicationStatus.RUNNING:
            return
        if app and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise RuntimeError(f"reward service {name!r} did not start: {app.message}")
        if time.monotonic() > deadline:
            state = f"{app.status.value} {app.message}".strip() if app else "unknown to Serve"
            raise TimeoutError(f"reward service {name!r} did not start in time: it is {state}")
        time.sleep(POLL_SECONDS)


def _wait_for_route(port: int, name: str, deadline: float) -> None:
    """Until our own endpoint answers there: Serve may have started before with other settings."""
    url = f"http://{HOST}:{port}/health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=2.0) as answer:
                if json.load(answer).get("service") == name:
                    return
                problem = "another service answers there"
        except (OSError, ValueError) as error:
            problem = brief(error)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"reward.port={port}: {url} does not answer ({problem}); if this cluster's Serve "
                "was started before with other HTTP settings, set reward.port=0 or shut it down"
            )
        time.sleep(POLL_SECONDS)


def _remove(name: str, token_file: str = "", only_file: bool = False) -> None:
    if token_file:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(token_file)
    if only_file or not ray.is_initialized():
        return
    try:
        apps = set(serve.status().applications)
        if name in apps:
            serve.delete(name)
            if apps == {name}:
                serve.shutdown()
    except Exception as error:  # a cluster that goes down takes Serve with it
        log.warning("reward service %r was not shut down cleanly: %s", name, brief(error))
