"""The reward service's HTTP endpoint for people, in front of the same scorers.

    POST /score   {"prompts": [[int]], "responses": [[int]]}, with `Authorization: Bearer TOKEN`
                  → {"rewards": [number or null], "failures": {"index": "what went wrong"},
                     "identity": "the reward's"}
    GET  /health  → {"status": "ok", "service": name}, without a token

Anything else is refused with {"error": "one line"}: 400 malformed, 401 token, 404, 405, 408 too
slow, 413 too large, 422 wrong shape or ids.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from configs.schema import RewardConfig
from reward_server.client import RewardClient

BODY_SECONDS = 10.0  # a request's body must have arrived by then
SCORE_SECONDS = 60.0
LARGEST_ID = int(np.iinfo(np.int32).max)

log = logging.getLogger("ray.serve")


class Refusal(Exception):
    """A request that is turned away with an HTTP status and one line for its sender."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Endpoint:
    """The Serve ingress. It knows only the token's SHA-256, so that no copy of it lies about."""

    def __init__(self, scorer: DeploymentHandle, name: str, digest: bytes, limit: int) -> None:
        self.client = RewardClient(scorer, name)
        self.digest = digest
        self.limit = limit  # bytes of a request's body

    async def __call__(self, request: Request) -> Response:
        try:
            return JSONResponse(await self._answer(request))
        except Refusal as refusal:
            log.warning("refused %.20r: %d %s", request.method, refusal.status, refusal)
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
            return JSONResponse({"error": str(refusal)}, refusal.status, headers)

    async def _answer(self, request: Request) -> dict[str, Any]:
        route = (request.scope["path"], request.method)  # `url` trips over an odd query string
        if route == ("/health", "GET"):
            return {"status": "ok", "service": self.client.name}
        if route[0] not in ("/score", "/health"):
            raise Refusal(404, "no such page: there are POST /score and GET /health")
        if route != ("/score", "POST"):
            raise Refusal(405, "ask POST /score or GET /health")
        self._authorise(request)
        try:
            body = await asyncio.wait_for(self._read(request), BODY_SECONDS)
        except TimeoutError:
            raise Refusal(408, f"the body was not complete after {BODY_SECONDS:g} s") from None
        except ClientDisconnect:
            raise Refusal(400, "the sender left before its body was complete") from None
        prompts, responses = parse(body)
        return await self._score(prompts, responses)

    def _authorise(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Refusal(401, "a bearer token is needed: Authorization: Bearer TOKEN")
        if not hmac.compare_digest(token_digest(given.strip().encode("latin-1")), self.digest):
            raise Refusal(401, "wrong bearer token")

    async def _read(self, request: Request) -> bytes:
        """The body, read no further than the limit whatever length the sender declares."""
        large = Refusal(413, f"the body is over {self.limit} bytes (reward.max_request_bytes)")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self.limit:  # Python reads 4,300 digits
            raise large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limit:
                raise large
        return bytes(body)

    async def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Any]:
        scores = await asyncio.to_thread(self.client.score, prompts, responses, SCORE_SECONDS)
        rewards = [None if np.isnan(r) else r for r in scores.reward.tolist()]
        failures = {str(i): why for i, why in scores.failures.items()}
        return {"rewards": rewards, "failures": failures, "identity": scores.identity}


def token_digest(token: bytes) -> bytes:
    """What the endpoint keeps of a token, and compares."""
    return hashlib.sha256(token).digest()


def token(config: RewardConfig) -> tuple[bytes, str]:
    """(digest of the bearer token, the file that holds it if it is one that we made).

    The token is in the environment variable that `reward.token_env` names; unset or empty, it is
    drawn at random and written to a file that only this user can read.
    """
    given = os.environ.get(config.token_env, "").strip()
    if given:
        return token_digest(given.encode()), ""
    drawn = secrets.token_urlsafe(32)
    descriptor, path = tempfile.mkstemp(prefix="onpolicy-reward-token-")  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(drawn)
    return token_digest(drawn.encode()), path


def parse(body: bytes) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, responses) of a request's JSON body. Refusal: 400 no JSON, 422 wrong shape."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not valid JSON") from None
    if not isinstance(content, dict) or set(content) != {"prompts", "responses"}:
        raise Refusal(422, 'the body must be {"prompts": [[int]], "responses": [[int]]}')
    for name, rows in content.items():
        _check_rows(name, rows)
    prompts, responses = content["prompts"], content["responses"]
    if len(prompts) != len(responses):
        raise Refusal(422, f"{len(prompts)} prompts for {len(responses)} responses")
    return prompts, responses


def _check_rows(name: str, rows: Any) -> None:
    if not isinstance(rows, list):
        raise Refusal(422, f"{name} must be a list of lists of token ids")
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise Refusal(422, f"{name}[{i}] must be a list of token ids")
        for j, token in enumerate(row):
            if type(token) is not int or not 0 <= token <= LARGEST_ID:
                raise Refusal(422, f"{name}[{i}][{j}] must be an integer from 0 to {LARGEST_ID}")
