"""Play rollouts without a model: from a script, or by a person at the prompt, who write actions one a line."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from backtalk.capture.rollout import Left, Reply, Seen
from backtalk.errors import ConfigError, DataError
from backtalk.messages import Message, ToolCall, ToolSpec


class Script:
    """An author that replies with its lines one after the other, and leaves after the last."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = iter(lines)

    async def reply(self, seen: Seen) -> Reply:
        line = next(self._lines, None)
        if line is None:
            raise Left("the script has no line left")
        return read_action(line, seen.tools)


def read_script(path: Path) -> list[str]:
    """Return the lines of a script that are actions: all but empty ones and those that begin with #.

    Raises:
        DataError: it cannot be read, or has none.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the script {path} cannot be read ({error}); write an action a line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise DataError(f"the script {path} has no action; write one a line, for example: ls -la")
    return lines


class Person:
    """A person who is shown the environment's messages and asked for a line. Ctrl-D leaves.

    ``ask`` may block; it runs in a thread of its own, so that the environment's connections stay alive. A line that is
    no action is refused with ``warn``, and asked for again.
    """

    def __init__(self, ask: Callable[[], str], show: Callable[[Message], None], warn: Callable[[str], None]) -> None:
        self._ask, self._show, self._warn = ask, show, warn

    async def reply(self, seen: Seen) -> Reply:
        for message in seen.messages:
            self._show(message)
        while True:
            try:
                line = (await _in_thread(self._ask)).strip()
            except EOFError as error:
                raise Left("the person left") from error
            if not line:
                continue
            try:
                return read_action(line, seen.tools)
            except ConfigError as error:
                self._warn(str(error))


async def _in_thread(ask: Callable[[], str]) -> str:
    """Ask in a daemon thread: one of a pool would keep the process from ending while it waits for a line."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def settle(line: str, error: Exception | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error is not None else answer.set_result(line)

    def work() -> None:
        line, failure = "", None
        try:
            line = ask()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, line, failure)

    threading.Thread(target=work, name="backtalk-prompt", daemon=True).start()
    return await answer


def read_action(line: str, tools: Sequence[ToolSpec]) -> Reply:
    """Return a line as an action.

    - ``{"tool": "bash", "arguments": {"command": "ls"}}``: a call; with ``"text"`` before it, or text alone
    - ``/submit 42``: a call of the tool of that name, with its one argument, or with ``/tool {"a": 1}`` all of them
    - ``ls -la``: a call of the first tool, where that takes one text

    Raises:
        ConfigError: it is none of these.
    """
    record = _json(line)
    if record is not None and {"tool", "text"} & set(record):
        return _from_json(record, line)
    word, _, rest = line.partition(" ")
    named = next((tool for tool in tools if word == f"/{tool.name}"), None)
    if named is not None:
        return Reply(call=_call(named, rest.strip(), line))
    first = tools[0] if tools else None
    if first is not None and _only_text(first) is not None:
        return Reply(call=_call(first, line, line))
    names = ", ".join(f"/{tool.name}" for tool in tools)
    raise ConfigError(f'{line!r} is no action; begin with {names}, or write {{"tool": NAME, "arguments": {{...}}}}')


def _from_json(record: dict[str, Any], line: str) -> Reply:
    unknown = set(record) - {"tool", "arguments", "text"}
    arguments = record.get("arguments", {})
    if unknown or not isinstance(arguments, dict) or not isinstance(record.get("text", ""), str):
        raise ConfigError(f"{line!r}: an action has a tool with arguments that are an object, and text; nothing else")
    call = ToolCall(str(record["tool"]), arguments) if "tool" in record else None
    return Reply(text=record.get("text", ""), call=call)


def _call(tool: ToolSpec, rest: str, line: str) -> ToolCall:
    arguments = _json(rest)
    if arguments is not None and set(arguments) <= set(tool.parameters.get("properties", {})):
        return ToolCall(tool.name, arguments)
    name = _only_text(tool)
    if name is not None:
        return ToolCall(tool.name, {name: rest})
    if not rest:
        return ToolCall(tool.name, {})
    takes = ", ".join(tool.parameters.get("properties", {})) or "nothing"
    raise ConfigError(f"{line!r}: {tool.name} takes {takes}; write them as an object, /{tool.name} {{...}}")


def _only_text(tool: ToolSpec) -> str | None:
    """Return the name of a tool's argument, where there is only one and it is text; else None."""
    properties = tool.parameters.get("properties", {})
    name = next(iter(properties), None)
    return name if len(properties) == 1 and properties[name].get("type") == "string" else None


def _json(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if text.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
