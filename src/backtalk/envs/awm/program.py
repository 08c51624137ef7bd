"""A scenario's FastAPI program, executed once in this process and called without a socket.

One program serves every rollout: each call is bound to the SQLite database of its rollout. The program has the rights
of this process, although it is code from a dataset; ``isolation`` therefore runs this module in a sandbox.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import quote

import httpx2

from backtalk.envs.awm.files import Scenario, ScenarioTask
from backtalk.envs.tool_schemas import plain_schema
from backtalk.errors import ConfigError, DataError
from backtalk.messages import ToolSpec

METHODS = ("get", "post", "put", "delete", "patch")


class RolloutDatabase(sqlite3.Connection):
    """An in-memory database with a single connection, which lives until ``release`` however often it is closed."""

    def close(self) -> None:
        """Roll back an open transaction: a program's connection pool closes the connection after each call."""
        if self.in_transaction:
            self.rollback()

    def release(self) -> None:
        """Free the database."""
        super().close()


# Database of the rollout whose call is being served. A context variable also holds in the threads in which FastAPI
# runs plain functions.
current_database: ContextVar[RolloutDatabase] = ContextVar("current_database")


def new_database(image: bytes = b"") -> RolloutDatabase:
    """Return an empty database, or a copy of a serialized one."""
    database = sqlite3.connect(":memory:", factory=RolloutDatabase, check_same_thread=False)
    if image:
        database.deserialize(image)
    return database


def build_image(schema: Iterable[str], inserts: Iterable[str]) -> bytes:
    """Run SQL statements in an empty database and return it serialized.

    Raises:
        DataError: SQLite refuses a statement.
    """
    database = new_database()
    try:
        for statement in (*schema, *inserts):
            try:
                database.execute(statement)
            except sqlite3.Error as error:
                raise DataError(f"SQLite refuses {statement[:200]!r}: {error}") from error
        database.commit()
        return database.serialize()
    finally:
        database.release()


@dataclass(frozen=True, slots=True)
class Operation:
    """The HTTP operation behind a tool, and which arguments go into its "path" or "query"."""

    method: str
    path: str
    places: Mapping[str, str]  # by argument

    def request(self, arguments: Mapping[str, Any]) -> httpx2.Request:
        """Return the request for a call; arguments that are in neither path nor query become the JSON body."""
        body, path, params = dict(arguments), self.path, {}
        for name, place in self.places.items():
            if name not in body or place not in ("path", "query"):
                continue
            value = body.pop(name)
            if place == "path":
                path = path.replace(f"{{{name}}}", quote(_text(value), safe=""))
            elif value is not None:
                params[name] = [_text(item) for item in value] if isinstance(value, list) else _text(value)
        content, headers = json.dumps(body).encode() if body else b"", {"Content-Type": "application/json"}
        return httpx2.Request(self.method, f"http://awm{path}", params=params, content=content, headers=headers)


class Program:
    """The tools of a scenario.

    Raises:
        ConfigError: FastAPI or SQLAlchemy is not installed.
        DataError: the program cannot be executed, or has no app or no tools.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        database = new_database(build_image(scenario.schema, scenario.inserts))
        bound = current_database.set(database)
        try:
            app = _execute(scenario)
            database.commit()
            self._image = database.serialize()  # the program may have added tables of its own
        finally:
            current_database.reset(bound)
            database.release()
        self._transport = httpx2.ASGITransport(app)
        self._operations, self.tools = _read_tools(app.openapi())
        if not self.tools:
            raise DataError(f"the program of scenario {scenario.name!r} has no operation with an id, so no tool")

    def initial_image(self, task: ScenarioTask) -> bytes:
        """Return the serialized database that a rollout of the task starts from."""
        if task.inserts == self.scenario.inserts:
            return self._image
        return build_image(self.scenario.schema, task.inserts)

    async def call(self, database: RolloutDatabase, tool: str, arguments: Mapping[str, Any]) -> httpx2.Response | None:
        """Carry out one call in a rollout's database; return None if there is no such tool."""
        operation = self._operations.get(tool)
        if operation is None:
            return None
        bound = current_database.set(database)
        try:
            response = await self._transport.handle_async_request(operation.request(arguments))
            await response.aread()
            return response
        except Exception:  # as a server answers where the program raises
            database.close()
            return httpx2.Response(500, text="Internal Server Error")
        finally:
            current_database.reset(bound)


def missing_package(name: str | None) -> str:
    """Return the error message for a package that scenarios are written with and that is not installed."""
    return (
        "scenarios of the Agent World Model are FastAPI programs over SQLAlchemy, and this Python has no "
        f"{name}; pip install 'backtalk[awm]', or play them on a server: awm:http://HOST:PORT"
    )


def _execute(scenario: Scenario) -> Any:
    """Execute the program's source and return its app. The line that makes its engine is replaced, as OpenEnv does."""
    try:
        from fastapi import FastAPI
        from sqlalchemy.pool import NullPool
    except ImportError as error:
        raise ConfigError(missing_package(error.name)) from error
    module = ModuleType(f"awm_scenario_{scenario.name}")
    vars(module).update(_awm_connect=current_database.get, _awm_pool=NullPool)
    engine = r"\1create_engine('sqlite://', creator=_awm_connect, poolclass=_awm_pool)"
    source = re.sub(
        r"^(?!\s*(?:def|from|import)\b)(.*?)\bcreate_engine\(.*$", engine, scenario.program, flags=re.MULTILINE
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
    """Return a tool for each operation with an id in an OpenAPI document, with all of its arguments side by side."""
    operations, tools = {}, []
    for path, item in document.get("paths", {}).items():
        for method, operation in item.items():
            name = operation.get("operationId") if method in METHODS else None
            if not name:
                continue
            properties: dict[str, Any] = {}
            required: list[str] = []
            places: dict[str, str] = {}
            for parameter in operation.get("parameters", ()):
                schema = plain_schema(parameter.get("schema", {}), document)
                described = {"description": parameter["description"]} if parameter.get("description") else {}
                properties[parameter["name"]] = schema | described
                required += [parameter["name"]] if parameter.get("required") else []
                places[parameter["name"]] = parameter["in"]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            body = plain_schema(body, document)
            properties |= body.get("properties", {})
            required += body.get("required", ())
            operations[name] = Operation(method.upper(), path, places)
            texts = dict.fromkeys(filter(None, (operation.get("summary"), operation.get("description"))))
            parameters = {"type": "object", "properties": properties, "required": required}
            tools.append(ToolSpec(name, "\n\n".join(texts), parameters))
    return operations, tuple(tools)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
