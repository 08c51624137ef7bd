"""Answer the page's questions: a small read-only web application over run folders and files of trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from hashlib import sha1
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from backtalk.errors import BacktalkError, DataError
from backtalk.trajectory import TokenRole
from backtalk.viewer.data import LOOKS
from backtalk.viewer.live.curves import describe, read_curves
from backtalk.viewer.live.query import parse_query, select, sorted_rows
from backtalk.viewer.live.rollout import Opened
from backtalk.viewer.live.search import Search
from backtalk.viewer.live.sources import Library, RunSource, Source
from backtalk.viewer.live.table import NUMBERS, RolloutTable, compute, read_facts

log = logging.getLogger(__name__)

HOSTS = ["127.0.0.1", "localhost", "[::1]"]  # a page of another name that resolves to this machine is refused
MAX_ROWS = 500  # of the table, in one answer
STATIC = Path(str(resources.files("backtalk"))) / "viewer" / "live" / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the browser keeps an answer and asks whether it still holds
}


class Viewer:
    """What the page asks for, as plain data."""

    def __init__(self, library: Library) -> None:
        self.library, self.table, self.search = library, RolloutTable(), Search()

    def sources(self, params: Mapping[str, str]) -> Any:
        """Return all runs and files, with the roles that tokens can have."""
        roles = [{"role": role.name, "meaning": LOOKS[role][3]} for role in TokenRole]
        return {"sources": [describe(source) for source in self.library.sources().values()], "roles": roles}

    def curves(self, params: Mapping[str, str]) -> Any:
        """Return the curves of one run."""
        source = self.library.source(params.get("run", ""))
        if not isinstance(source, RunSource):
            raise DataError(f"{source.name} is a file of trajectories, which has no curves; open its rollouts")
        return read_curves(source)

    def rollouts(self, params: Mapping[str, str]) -> Any:
        """Return rows of the table that fit a query, ``offset`` to ``offset + limit`` of them, and counts."""
        sources = self._chosen(params)
        query = parse_query(params.get("q", ""))
        table, unread, problems = self.table.read(sources)
        table, snippets, unsearched = self._said(table.filter(select(table, query.conditions)), sources, query.words)
        table = sorted_rows(table, params.get("sort", "step"), params.get("order", "desc") != "asc")
        offset, limit = _number(params, "offset", 0), min(_number(params, "limit", 100), MAX_ROWS)
        rows = table.slice(offset, limit).to_pylist()
        for row in rows:
            row |= {"snippet": snippets.get((row["run"], row["part"], int(row["row"])))}
            row["failure"] = row["failure"] and json.loads(row["failure"])
        refusals = [f"{refusal.where}: {refusal.reason}" for source in sources for refusal in source.refusals]
        return {
            "total": table.num_rows,
            "rows": rows,
            "pending": unread + unsearched,
            "problems": problems + refusals,
            "means": _means(table),
            "stops": _counts(table, "stop"),
        }

    def rollout(self, params: Mapping[str, str]) -> Any:
        """Return one rollout as a conversation, with its siblings."""
        opened = self._opened(params)
        rows = read_facts(opened.source.name, opened.part).to_pylist()
        group = next((row["group"] for row in rows if row["row"] == opened.row), None)
        return {**opened.conversation(), "group": group, "siblings": [row for row in rows if row["group"] == group]}

    def tokens(self, params: Mapping[str, str]) -> Any:
        """Return every token of one rollout."""
        return self._opened(params).tokens()

    def record(self, params: Mapping[str, str]) -> Any:
        """Return one rollout as it is on record."""
        return self._opened(params).record()

    def _opened(self, params: Mapping[str, str]) -> Opened:
        return Opened.find(self.library.source(params.get("run", "")), params.get("part", ""), _number(params, "row"))

    def _chosen(self, params: Mapping[str, str]) -> list[Source]:
        names = [name for name in params.get("runs", "").split("\n") if name]
        return [self.library.source(name) for name in names] or list(self.library.sources().values())

    def _said(self, table: Any, sources: list[Source], words: tuple[str, ...]) -> tuple[Any, dict[Any, str], int]:
        """Return the rows in which all words were said, the text around them, and the number of files left."""
        import pyarrow as pa

        if not words:
            return table, {}, 0
        keys = list(zip(table["run"].to_pylist(), table["part"].to_pylist(), strict=True))
        found, pending = self.search.find(sources, words, set(keys))
        rows = table["row"].to_pylist()
        mask = [(*key, int(row)) in found for key, row in zip(keys, rows, strict=True)]
        return table.filter(pa.array(mask, pa.bool_())), found, pending


def make_app(library: Library) -> Starlette:
    """Return the web application."""
    viewer = Viewer(library)
    names = ("sources", "curves", "rollouts", "rollout", "tokens", "record")
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


def _number(params: Mapping[str, str], name: str, default: int | None = None) -> int:
    try:
        return int(params[name]) if default is None or name in params else default
    except (KeyError, ValueError):
        raise DataError(f"{name} has to be a whole number, got {params.get(name)!r}") from None


def _means(table: Any) -> dict[str, float | None]:
    pc = compute()
    return {name: pc.mean(table[name]).as_py() for name in NUMBERS if name not in ("row", "group", "sample", "version")}


def _counts(table: Any, column: str) -> dict[str, int]:
    pc = compute()
    return {str(pair["values"]): pair["counts"] for pair in pc.value_counts(table[column]).to_pylist()}
