"""A scenario's program, executed once in this process and called without a socket.

Each call is bound to the database of its episode, so that one program serves them all. The program has the rights of
this process: it is code that somebody wrote into a dataset. ``isolation`` runs this module in a sandbox.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from backtalk.envs.awm.database import EpisodeDatabase, build_image, current_database, new_database
from backtalk.envs.awm.files import Contents, Scenario
from backtalk.envs.tool_schemas import plain_schema
from backtalk.errors import ConfigError, DataError
from backtalk.messages import ToolSpec

METHODS = ("get", "post", "put", "delete", "patch")


class Reply(NamedTuple):
    """What a program answered: text, and the HTTP status it came with."""

    text: str
    status: int


@dataclass(frozen=True, slots=True)
class Operation:
    """Where the arguments of a tool go."""

    method: str
    path: str
    in_path: frozenset[str]
    in_query: frozenset[str]


class Program:
    """A scenario's tools.

    Raises:
        ConfigError: FastAPI or SQLAlchemy is not installed.
        DataError: the program cannot be executed, or has no app or no tools.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._image = build_image(scenario.schema, scenario.inserts)
        database = new_database(self._image)
        bound = current_database.set(database)
        try:
            self._app = _execute(scenario)  # which may add tables of its own to the database
            database.commit()
            self._image = database.serialize()
        finally:
            current_database.reset(bound)
            database.release()
        self._operations, self.tools = _read_tools(self._app.openapi())
        if not self.tools:
            raise DataError(f"the program of scenario {scenario.name!r} has no operation with an id, so no tool")

    def image(self, contents: Contents) -> bytes:
        """The database that an episode of these contents begins with."""
        if contents.inserts == self.scenario.inserts:
            return self._image
        return build_image(self.scenario.schema, contents.inserts)

    async def call(self, database: EpisodeDatabase, tool: str, arguments: Mapping[str, Any]) -> Reply | None:
        """Carry out one call in an episode's database; None where there is no such tool."""
        operation = self._operations.get(tool)
        if operation is None:
            return None
        bound = current_database.set(database)
        try:
            status, content = await _request(self._app, operation, arguments)
        except Exception:  # what a program does not catch is its answer, as over HTTP
            database.close()
            return Reply("Internal Server Error", 500)
        finally:
            current_database.reset(bound)
        return Reply(content.decode("utf-8", "replace"), status)


def missing_package(name: str | None) -> str:
    """Return the error message for a package that scenarios are written with and that is not installed."""
    return (
        "scenarios of the Agent World Model are FastAPI programs over SQLAlchemy, and this Python has no "
        f"{name}; pip install 'backtalk[awm]', or play them on a server: awm:http://HOST:PORT"
    )


def _execute(scenario: Scenario) -> Any:
    """Run the program's source and give its app. The line that makes its engine is replaced, as OpenEnv does."""
    try:
        from fastapi import FastAPI
        from sqlalchemy.pool import NullPool
    except ImportError as error:
        raise ConfigError(missing_package(error.name)) from error
    module = ModuleType(f"awm_scenario_{scenario.name}")
    vars(module).update(_awm_connect=current_database.get, _awm_pool=NullPool)
    made = r"\1create_engine('sqlite://', creator=_awm_connect, poolclass=_awm_pool)"
    source = re.sub(
        r"^(?!\s*(?:def|from|import)\b)(.*?)\bcreate_engine\(.*$", made, scenario.program, flags=re.MULTILINE
    )
    try:
        exec(compile(source, f"<scenario {scenario.name}>", "exec"), vars(module))
    except Exception as error:
        raise DataError(
            f"the program of scenario {scenario.name!r} cannot be executed: {type(error).__name__}: {error}"
        ) from error
    app = vars(module).get("app")
    if not isinstance(app, FastAPI):
        raise DataError(f"the program of scenario {scenario.name!r} makes no FastAPI app called app")
    return app


def _read_tools(document: Mapping[str, Any]) -> tuple[dict[str, Operation], tuple[ToolSpec, ...]]:
    """Tools from an OpenAPI document: one for each operation with an id, all of its arguments side by side."""
    operations, tools = {}, []
    for path, item in document.get("paths", {}).items():
        for method, operation in item.items():
            name = operation.get("operationId") if method in METHODS else None
            if not name:
                continue
            properties: dict[str, Any] = {}
            required: list[str] = []
            places: dict[str, set[str]] = {"path": set(), "query": set()}
            for parameter in operation.get("parameters", ()):
                properties[parameter["name"]] = _parameter_schema(parameter, document)
                required += [parameter["name"]] if parameter.get("required") else []
                places.setdefault(parameter["in"], set()).add(parameter["name"])
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            body = plain_schema(body, document)
            properties |= body.get("properties", {})
            required += body.get("required", ())
            operations[name] = Operation(method.upper(), path, frozenset(places["path"]), frozenset(places["query"]))
            said = "\n\n".join(dict.fromkeys(filter(None, (operation.get("summary"), operation.get("description")))))
            tools.append(ToolSpec(name, said, {"type": "object", "properties": properties, "required": required}))
    return operations, tuple(tools)


def _parameter_schema(parameter: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    schema = plain_schema(parameter.get("schema", {}), document)
    return schema | ({"description": parameter["description"]} if parameter.get("description") else {})


async def _request(app: Any, operation: Operation, arguments: Mapping[str, Any]) -> tuple[int, bytes]:
    """One HTTP request to an ASGI app, straight into it."""
    given = dict(arguments)
    path = operation.path
    for name in operation.in_path & given.keys():
        path = path.replace(f"{{{name}}}", quote(_text(given.pop(name)), safe=""))
    query = {name: given.pop(name) for name in sorted(operation.in_query & given.keys())}
    pairs = {name: [_text(item) for item in value] if isinstance(value, list) else _text(value)
             for name, value in query.items() if value is not None}  # fmt: skip
    body = json.dumps(given).encode() if given else b""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": operation.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": urlencode(pairs, doseq=True).encode(),
        "headers": [(b"host", b"awm"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "client": ("awm", 0),
        "server": ("awm", 80),
        "root_path": "",
    }
    status, chunks = 500, []
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # nobody hangs up
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(chunks)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
