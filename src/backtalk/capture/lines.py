"""Read actions as people and scripts write them, one a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from backtalk.capture.author import Reply
from backtalk.errors import ConfigError
from backtalk.messages import ToolCall, ToolSpec


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
