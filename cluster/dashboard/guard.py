"""Who may see the live page, and what a browser may do with it."""

import hmac
import logging
import secrets

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHORTEST = 16  # characters of a token
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = logging.getLogger(__name__)


class Guard:
    """Lets through who has the token, if there is one, and gives every answer its headers.

    The token comes as `Authorization: Bearer TOKEN`, or once as `?token=TOKEN`, which is traded for
    a cookie and taken out of the address. The cookie is drawn at the start, so it says nothing of
    the token and ends with the server. On loopback, where a page of another site may have its name
    resolve to this machine, only this machine's own names are answered to.
    """

    def __init__(self, app: ASGIApp, token: str, local: bool) -> None:
        self.app = app
        self.token, self.local = token, local
        self.ticket = secrets.token_urlsafe(32)
        self.refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        answer = self._answer(Request(scope)) or self.app
        await answer(scope, receive, with_headers)

    def _answer(self, request: Request) -> Response | None:
        """None where the request may go on."""
        if self.local and _name(request.headers.get("host", "")) not in LOCAL_NAMES:
            return self._refuse(request, 421, "this page answers to 127.0.0.1 and localhost")
        if not self.token:
            return None
        cookie = f"onpolicy-{(request.scope.get('server') or ('', ''))[1]}"
        given = request.query_params.get("token")
        if given is not None and _same(given, self.token):
            query = URL(scope=request.scope).remove_query_params("token").query
            response = RedirectResponse("/" + (f"?{query}" if query else ""), 303)
            response.set_cookie(cookie, self.ticket, httponly=True, samesite="strict")
            return response
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(bearer.strip(), self.token):
            return None
        if _same(request.cookies.get(cookie, ""), self.ticket):
            return None
        return self._refuse(request, 401, "a token is needed: open /?token=TOKEN")

    def _refuse(self, request: Request, status: int, why: str) -> Response:
        self.refused += 1
        if self.refused == 1:
            who = request.client.host if request.client else "?"
            log.warning("refused a request from %s: %s (said once)", who, why)
        return PlainTextResponse(why + "\n", status)


def _name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _same(given: str, right: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(errors="replace"), right.encode())
