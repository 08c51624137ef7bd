"""One session at an OpenEnv server: a WebSocket with an environment of its own on the server.

OpenEnv's own client opens a new socket where the old one has died, and the next step is then taken in a fresh
environment that was never reset. Here a session that has died stays dead, and says why.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from backtalk.errors import ConfigError, InfrastructureError

PROTOCOL = "OpenEnv's WebSocket protocol, as in openenv 0.10 and openenv-core 0.3"
MAX_MESSAGE_BYTES = 100 * 2**20  # of one answer, as in OpenEnv's own client
CONNECT_TIMEOUT_S = 10.0
STEP_TIMEOUT_S = 60.0


class OpenEnvError(InfrastructureError):
    """An OpenEnv server died, stalled, or gave an answer that is not of its protocol."""


class OpenEnvRefusal(OpenEnvError):
    """The server answered with an error of the protocol and goes on. ``code`` is one of OpenEnv's WSErrorCode."""

    def __init__(self, message: str, code: str, data: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.code, self.data = code, data


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a reset or a step. ``reward`` is None where the environment gave none."""

    observation: Mapping[str, Any]
    reward: float | None
    done: bool


class OpenEnvSession:
    """An environment on a server, from reset to close; made by :func:`connect`, for one task at a time.

    Raises:
        OpenEnvRefusal: from any method, when the server answers with an error. The session can go on.
        OpenEnvError: from any method, when the server died, gave no answer in time, or broke the protocol. The session
            is over: every later call raises too, because a late answer could be taken for that of another call.
    """

    def __init__(self, socket: Any, url: str, step_timeout_s: float, log_tail: Callable[[], str]) -> None:
        self._socket, self.url, self._timeout_s, self._log_tail = socket, url, step_timeout_s, log_tail
        self._over: str | None = None  # the reason why the session is over

    async def reset(self, **arguments: Any) -> Result:
        """Reset the environment; ``arguments`` are those of its reset, ``seed`` for example."""
        return self._result(await self._ask("reset", arguments))

    async def step(self, action: Mapping[str, Any]) -> Result:
        """Take one action, in the fields of the environment's action schema."""
        return self._result(await self._ask("step", action))

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Call a tool of an MCP environment, which is a step."""
        return await self.step({"type": "call_tool", "tool_name": name, "arguments": dict(arguments)})

    async def list_tools(self) -> list[dict[str, Any]]:
        """Return the tools of an MCP environment: name, description, input_schema."""
        observation = (await self.step({"type": "list_tools"})).observation
        tools = observation.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) and "name" in tool for tool in tools):
            raise self._malformed(f"to list_tools {_excerpt(observation)}, which holds no list of tools with names")
        return tools

    async def close(self) -> None:
        """Give the environment back. A connection that is broken already is no error here."""
        alive, self._over = self._over is None, self._over or "it was closed"
        try:
            if alive:
                with suppress(_connection_closed(), OSError):
                    await self._socket.send('{"type": "close"}')
                    await self._socket.close()
        finally:
            self._socket.transport.abort()

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        if self._over is not None:
            raise OpenEnvError(f"the session at {self.url} is over: {self._over}; open another one")
        message = json.dumps({"type": kind, "data": data})
        self._over = f"its {kind} was broken off"  # stays if this is cancelled: the answer may still come
        try:
            async with asyncio.timeout(self._timeout_s):
                with suppress(_connection_closed()):  # a server that refuses a session sends why, and closes
                    await self._socket.send(message)
                raw = await self._socket.recv()
        except TimeoutError:
            raise self._end(
                f"gave no answer to a {kind} within {self._timeout_s:g} s; give it more (step_timeout_s) or see its log"
            ) from None
        except (_connection_closed(), OSError) as error:
            raise self._end(f"closed the connection during a {kind} ({error}); its own log says why") from error
        answer = self._read(raw, kind)
        self._over = None
        if answer["type"] == "error":
            error = answer["data"]
            code, reason = str(error.get("code", "UNKNOWN")), error.get("message", "no message")
            text = f"the server at {self.url} answered a {kind} with the error {code}: {reason}"
            raise OpenEnvRefusal(text, code, error)
        return answer["data"]

    def _read(self, raw: str | bytes, kind: str) -> dict[str, Any]:
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._malformed(f"to a {kind} what is not JSON ({error}): {_excerpt(raw)}") from error
        match answer:
            case {"type": "observation" | "error", "data": dict()}:
                return answer
        raise self._malformed(f"to a {kind} {_excerpt(answer)}, where type 'observation' and an object data belong")

    def _result(self, data: Mapping[str, Any]) -> Result:
        observation, reward, done = data.get("observation"), data.get("reward"), data.get("done", False)
        if not isinstance(observation, dict):
            raise self._malformed(f"{_excerpt(data)}, which has no observation")
        if reward is not None and not _is_finite(reward):
            raise self._malformed(f"reward={_excerpt(reward)}, which is no finite number; null says that there is none")
        if not isinstance(done, bool):
            raise self._malformed(f"done={_excerpt(done)}, which is neither true nor false")
        return Result(observation, None if reward is None else float(reward), done)

    def _malformed(self, answer: str) -> OpenEnvError:
        return self._end(f"answered {answer}; spoken here is {PROTOCOL}")

    def _end(self, reason: str) -> OpenEnvError:
        self._over = reason
        return OpenEnvError(f"the server at {self.url} {reason}{self._log_tail()}")


async def connect(
    url: str,
    *,
    step_timeout_s: float = STEP_TIMEOUT_S,
    headers: Mapping[str, str] | None = None,
    log_tail: Callable[[], str] = str,
) -> OpenEnvSession:
    """Open a session at ``url`` (http, https, ws or wss). ``$NAME`` in a header is that environment variable.

    ``log_tail`` returns the end of the server's log, which is appended to the message of an error.

    Raises:
        OpenEnvError: no server answers there, or it does not speak this protocol.
        ConfigError: websockets is not installed, or the URL is malformed.
    """
    try:
        from websockets.asyncio.client import connect as open_socket
        from websockets.exceptions import InvalidHandshake, InvalidStatus
    except ImportError as error:
        raise ConfigError(missing_package("websockets")) from error
    local = is_loopback(url)
    try:
        socket = await open_socket(
            f"{websocket_url(url)}/ws",
            open_timeout=CONNECT_TIMEOUT_S,
            close_timeout=1.0,
            max_size=MAX_MESSAGE_BYTES,
            compression=None if local else "deflate",
            proxy=None if local else True,
            ping_timeout=None,  # pings keep the connection open; step_timeout_s limits the time of an answer
            additional_headers=expand_headers(headers),
        )
    except InvalidStatus as error:
        raise OpenEnvError(
            f"{url} answers, but opens no WebSocket at /ws (HTTP {error.response.status_code}). A server of "
            f"an early openenv-core has none, and a private one wants headers; spoken here is {PROTOCOL}{log_tail()}"
        ) from error
    except (OSError, TimeoutError, InvalidHandshake) as error:
        reason = f"{error or type(error).__name__}"
        raise OpenEnvError(f"no OpenEnv server answers at {url} ({reason}){log_tail()}") from error
    return OpenEnvSession(socket, url, step_timeout_s, log_tail)


def websocket_url(url: str) -> str:
    """Return the URL with ws for http and wss for https, without a slash at the end."""
    scheme, _, rest = url.partition("://")
    known = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if scheme not in known or not rest:
        raise ConfigError(f"{url!r} is no address of a server; write one such as http://127.0.0.1:8000")
    return f"{known[scheme]}://{rest.rstrip('/')}"


def expand_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return headers with ``$NAME`` replaced by the environment variable NAME."""
    return {name: os.path.expandvars(value) for name, value in (headers or {}).items()}


def is_loopback(url: str) -> bool:
    """Tell whether a URL is one of this machine's own addresses."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def missing_package(package: str) -> str:
    """Return the error message for a package that is not installed."""
    return f"OpenEnv environments need the package {package}, which is not installed; pip install 'backtalk[openenv]'"


@cache
def _connection_closed() -> type[Exception]:
    """Return the exception of a closed socket; websockets is imported when a session is made, not before."""
    from websockets.exceptions import ConnectionClosed

    return ConnectionClosed


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value[:400] if isinstance(value, bytes) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."
