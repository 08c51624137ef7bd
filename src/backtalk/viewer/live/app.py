"""Answer the page's questions: a small read-only web application over run folders and files of trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from hashlib import sha1
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from backtalk.errors import BacktalkError
from backtalk.viewer.live.answers import Viewer
from backtalk.viewer.live.page import STATIC
from backtalk.viewer.live.sources import Library

log = logging.getLogger(__name__)

HOSTS = ["127.0.0.1", "localhost", "[::1]"]  # a page of another name that resolves to this machine is refused
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the browser keeps an answer and asks whether it still holds
}


def make_app(library: Library) -> Starlette:
    """Return the web application."""
    viewer = Viewer(library)
    names = ("sources", "curves", "rollouts", "world", "knowledge", "studies", "rollout", "tokens", "record")
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html"), name="page"),
        *(Route(f"/api/{name}", _answer(getattr(viewer, name)), name=name) for name in names),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(_Headers)]
    return Starlette(routes=routes, middleware=middleware)


class _Headers:
    """Puts the same headers on every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def _answer(question: Callable[[Mapping[str, str]], Any]) -> Callable[[Request], Response]:
    """Return a handler that answers in JSON; the text is ASCII, so that no text in it can be unwritable.

    The server runs it in a thread, because it reads files.
    """

    def handler(request: Request) -> Response:
        try:
            status, data = 200, question(request.query_params)
        except BacktalkError as error:
            status, data = 404, {"error": str(error)}
        except Exception as error:  # a bug of ours, or a file of a shape that nobody foresaw; the page goes on
            log.exception("%s", request.url)
            status, data = 500, {"error": f"{type(error).__name__}: {error} (the terminal has the traceback)"}
        body = json.dumps(data, separators=(",", ":")).encode()
        tag = f'"{sha1(body, usedforsecurity=False).hexdigest()}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return Response(body, status, {"ETag": tag}, "application/json")

    return handler
