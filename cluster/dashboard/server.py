"""The live page's web server: three files, and two questions answered in JSON.

    GET /                  the page; /page.js, /page.css and /plotly.js are all that it loads
    GET /api/runs          {"runs": [a line a run], "chosen": [names], "charts": [a chart]}
    GET /api/run?name=&have=   what the page shows of a run; 204 where it is still the tag `have`

It binds to loopback unless told otherwise, and beyond loopback it needs a token. Nothing is ever
written, and no path is made of what a request says.
"""

import importlib.util
import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from cluster.dashboard.charts import CHARTS
from cluster.dashboard.guard import SHORTEST, Guard
from cluster.dashboard.runs import Catalogue, find

TOKEN_ENV = "ONPOLICY_DASHBOARD_TOKEN"
_HERE = Path(__file__).parent


def app(
    catalogue: Catalogue, chosen: list[str], token: str = "", loopback: bool = True
) -> Starlette:
    """The page of these runs. chosen: names that it opens with; token: empty for none."""

    def runs(_: Request) -> Response:
        listed = {"runs": catalogue.listing(), "chosen": chosen}
        return JSONResponse(listed | {"charts": [asdict(chart) for chart in CHARTS]})

    def run(request: Request) -> Response:
        found = catalogue.run(request.query_params.get("name", ""))
        if found is None:
            return JSONResponse({"error": "no run of that name"}, 404)
        payload = found.payload(request.query_params.get("have", ""))
        return Response(status_code=204) if payload is None else JSONResponse(payload)

    routes = [
        Route("/", _file(_HERE / "page.html")),
        Route("/page.js", _file(_HERE / "page.js")),
        Route("/page.css", _file(_HERE / "page.css")),
        Route("/plotly.js", _file(plotly(), "max-age=86400")),
        Route("/api/runs", runs),
        Route("/api/run", run),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token, local=loopback)])


def _file(path: Path, keep: str = "no-cache") -> Callable[[Request], Response]:
    def answer(_: Request) -> Response:
        return FileResponse(path, headers={"Cache-Control": keep})

    return answer


def plotly() -> Path:
    """plotly.js as the Python package brings it, found without importing that."""
    package = importlib.util.find_spec("plotly")
    if package is None or package.origin is None:
        raise FileNotFoundError("the dashboard needs the package plotly, which is not installed")
    return Path(package.origin).parent / "package_data" / "plotly.min.js"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    names: list[str], root: Path, host: str, port: int, token: str, say: Callable[[str], None]
) -> None:
    """Serve the page until Ctrl-C. port: 0 for any free one; token: empty for the environment's.

    Raises FileNotFoundError for a run that is not there, ValueError for an address that cannot be
    had, or that needs a token.
    """
    token = token or os.environ.get(TOKEN_ENV, "").strip()
    loopback = is_loopback(host)
    if not loopback and not token:
        raise ValueError(f"--host {host} is beyond loopback: set a token, {TOKEN_ENV} or --token")
    if token and len(token) < SHORTEST:
        raise ValueError(f"the token is shorter than {SHORTEST} characters")
    catalogue = Catalogue(find(names, root), root)
    if not names and not root.is_dir():
        raise FileNotFoundError(f"no folder of runs at {root}: name a run, or --runs DIR")
    chosen = list(catalogue.directories()) if names else []
    application = app(catalogue, chosen, token, loopback)
    with _bound(host, port) as bound:
        place = f"[{host}]" if ":" in host else host
        say(f"http://{place}:{bound.getsockname()[1]}/" + ("?token=TOKEN" if token else ""))
        if not loopback:
            say("plain HTTP: on a network that others can read, go through `ssh -L` or TLS")
        settings = uvicorn.Config(
            application, log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(settings).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot serve on {host}:{port}: {error}") from None
