"""Whatever is sent to the reward endpoint: an answer, or a refusal that says why. Never a crash."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st
from starlette.requests import Request

from configs.schema import RewardConfig
from reward_server import endpoint
from reward_server.endpoint import Endpoint, token_digest
from reward_server.rewards import Scores, load, score_safely
from tests.fuzz import DEEP, NUMBERS, TEXT, VALUES, fuzz, json_text, mutated, trial

TOKEN = b"a secret of 32 characters, or so"
LIMIT = 2_000  # bytes of a body
REFUSALS = {400, 401, 404, 405, 408, 413, 422}


class Pending:
    """What a handle returns."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def result(self, timeout_s: float) -> Scores:
        return self.scores


class Handle:
    """A Serve handle to the bandit's reward, in this process."""

    def __init__(self) -> None:
        self.score = self
        self.reward = load(RewardConfig())

    def remote(self, pairs: Any) -> Pending:
        return Pending(score_safely(self.reward, *pairs.unpack()))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of refusals need not be told."""
    before = endpoint.log.level
    endpoint.log.setLevel(logging.ERROR)
    yield
    endpoint.log.setLevel(before)


HTTP = Endpoint(Handle(), "fuzzed", token_digest(TOKEN), LIMIT)


def ask(scope: dict[str, Any], chunks: list[bytes], complete: bool = True) -> tuple[int, Any]:
    """Status and decoded body of the ASGI answer to a request."""
    waiting = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    waiting += [{"type": "http.request", "body": b"", "more_body": False} if complete
                else {"type": "http.disconnect"}]  # fmt: skip

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def answer() -> tuple[int, Any]:
        response = await HTTP(Request(scope, receive))
        return response.status_code, json.loads(response.body)

    return asyncio.run(answer())


def scope(headers: list[tuple[bytes, bytes]], **changes: Any) -> dict[str, Any]:
    usual = {
        "type": "http", "method": "POST", "path": "/score", "raw_path": b"/score",
        "query_string": b"", "scheme": "http", "http_version": "1.1", "root_path": "",
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 9), "headers": headers,
    }  # fmt: skip
    return usual | changes


AUTHORISED = [(b"host", b"localhost"), (b"authorization", b"Bearer " + TOKEN)]


def check(status: int, content: Any) -> None:
    """2xx with rewards that are numbers or stated failures, or 4xx with a reason in one line."""
    if status == 200:
        rewards, failures = content["rewards"], content["failures"]
        assert {str(i) for i, r in enumerate(rewards) if r is None} == set(failures)
        assert all(r is None or np.isfinite(r) for r in rewards)
    else:
        assert status in REFUSALS
        assert len(content["error"]) > 5 and len(content["error"].splitlines()) == 1


# --- bodies ----------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 99), max_size=5)
ROWS = st.lists(TOKENS, max_size=3)
NEARLY = st.lists(TOKENS | st.lists(NUMBERS | VALUES, max_size=3) | VALUES, max_size=3)
SHAPED = st.fixed_dictionaries({"prompts": ROWS, "responses": ROWS}) | st.fixed_dictionaries(
    {"prompts": NEARLY | VALUES, "responses": NEARLY | VALUES}, optional={"x": VALUES}
)
PAIRED = st.lists(st.tuples(TOKENS, TOKENS), max_size=4).map(
    lambda pairs: {"prompts": [p for p, _ in pairs], "responses": [r for _, r in pairs]}
)
GOOD = json.dumps({"prompts": [[0], [1, 2]], "responses": [[70, 71], [3]]}).encode()
CODED = st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-8-sig", "utf-16-le"])
BODIES = st.one_of(
    st.binary(max_size=60),
    mutated(GOOD),
    (SHAPED | PAIRED | VALUES).map(json_text).map(str.encode),
    st.tuples(PAIRED.map(json_text), CODED).map(lambda pair: pair[0].encode(pair[1])),
    DEEP.map(str.encode),
    (NUMBERS | DEEP).map(lambda x: f'{{"prompts": [[{x}]], "responses": [[{x}]]}}'.encode()),
    st.integers(LIMIT - 3, LIMIT + 3).map(lambda n: GOOD + b" " * (n - len(GOOD))),
    st.just(b"[" + b"9" * 1900 + b"]"),
)


@st.composite
def chunked(draw: Callable[..., Any], bodies: st.SearchStrategy[bytes]) -> list[bytes]:
    """A body in pieces, empty ones among them."""
    body = draw(bodies)
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=3)))
    return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)])]


@fuzz(400, chunks=chunked(BODIES), complete=st.sampled_from([True, True, True, False]))
def test_any_body_is_scored_or_refused_with_a_reason(chunks: list[bytes], complete: bool) -> None:
    with trial("reward endpoint: bodies"):
        status, content = ask(scope(AUTHORISED), chunks, complete)
    check(status, content)
    size = sum(map(len, chunks))
    assert (status == 413) == (size > LIMIT)
    assert complete or status in (400, 413)


@fuzz(150, body=PAIRED)
def test_what_is_well_formed_is_scored(body: dict[str, Any]) -> None:
    sent = json.dumps(body).encode()
    with trial("reward endpoint: bodies"):
        status, content = ask(scope(AUTHORISED), [sent])
    assert (status, len(content["rewards"])) == (200, len(body["prompts"]))
    check(status, content)


# --- requests --------------------------------------------------------------------------------

RAW = st.binary(max_size=12) | TEXT.map(lambda t: t.encode("utf-8", "surrogatepass"))
LENGTHS = st.sampled_from([b"0", b"17", b"-1", b"1e3", b"9" * 5000, b"2001", b"+5", b"\xb2", b" 3"])
HOSTS = st.sampled_from([b"[", b"[::1", b"a@b:99999", b"x/y?z#", b"", b":", b"a:b", b"//", b"]"])
TOKENS_SENT = st.one_of(
    st.sampled_from([b"Bearer", b"Bearer ", b"bearer  " + TOKEN[:-1], b"Basic " + TOKEN, TOKEN]),
    RAW.map(lambda raw: b"Bearer " + raw),
    mutated(b"Bearer " + TOKEN),
    RAW,
)
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just(b"content-length"), LENGTHS | RAW),
        st.tuples(st.just(b"host"), HOSTS | RAW),
        st.tuples(st.just(b"transfer-encoding"), st.just(b"chunked")),
        st.tuples(RAW, RAW),
    ),
    max_size=4,
)
PATHS = TEXT | st.sampled_from(["/score", "/score", "/health", "/", "", "//score", "/score/", "*"])
METHODS = st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "post", ""]) | TEXT


@fuzz(
    400, headers=HEADERS, token=TOKENS_SENT, path=PATHS, method=METHODS, query=RAW, body=BODIES
)  # fmt: skip
def test_without_the_token_nothing_is_scored_whatever_else_is_sent(
    headers: list[tuple[bytes, bytes]],
    token: bytes,
    path: str,
    method: str,
    query: bytes,
    body: bytes,
) -> None:
    scheme, _, given = token.partition(b" ")
    if scheme.lower() == b"bearer" and given.strip() == TOKEN:
        return
    request = scope(
        [*headers, (b"authorization", token)], path=path, method=method, query_string=query
    )
    with trial("reward endpoint: requests"):
        status, content = ask(request, [body])
    if (path, method) == ("/health", "GET"):
        assert status == 200 and content["status"] == "ok"
    else:
        check(status, content)
        assert status == (401 if (path, method) == ("/score", "POST") else status) and status != 200


@fuzz(300, headers=HEADERS, length=LENGTHS, query=RAW, body=BODIES)
@example(headers=[], length=b"9" * 5000, query=b"", body=b"")
@example(headers=[], length=b"2", query=b"\x80", body=b"{}")
def test_with_the_token_any_headers_are_taken_or_refused(
    headers: list[tuple[bytes, bytes]], length: bytes, query: bytes, body: bytes
) -> None:
    sent = [h for h in headers if h[0].lower() != b"authorization"]
    sent += [AUTHORISED[1], (b"content-length", length)]
    with trial("reward endpoint: requests"):
        status, content = ask(scope(sent, query_string=query), [body])
    check(status, content)
    assert status != 401


def test_a_body_that_never_comes_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BODY_SECONDS", 0.05)

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("it was waited for")

    response = asyncio.run(HTTP(Request(scope(AUTHORISED), never)))
    assert response.status_code == 408
