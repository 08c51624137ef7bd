"""Tools as chat templates and policies are told about them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from backtalk.errors import ConfigError
from backtalk.language.tool_formats.base import Syntax
from backtalk.language.tool_formats.values import example
from backtalk.messages import ToolSpec

_SOME_TOOL = ToolSpec("tool", "", {"properties": {"argument": {"type": "string"}}})


def refuse_control_tokens(tools: Sequence[ToolSpec], controls: Iterable[str]) -> None:
    """Chat templates write tools down as they are, so a server's description could end a turn.

    Raises:
        ConfigError: a name, a description or a schema holds the spelling of a control token.
    """
    for tool in tools:
        said = json.dumps([tool.name, tool.description, dict(tool.parameters)], ensure_ascii=False)
        for token in controls:
            if token in said:
                raise ConfigError(f"tool {tool.name!r} holds {token!r}, a control token of this model; reword the tool")


def tool_schemas(tools: Sequence[ToolSpec]) -> list[dict[str, object]]:
    """What chat templates take as ``tools=``."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools
    ]


def listed(tools: Sequence[ToolSpec], calls: str) -> str:
    """The tools, one JSON line each."""
    lines = "\n".join(json.dumps(schema) for schema in tool_schemas(tools))
    return f"You can call these tools, {calls} in each reply:\n{lines}"


def shape(syntax: Syntax, tools: Sequence[ToolSpec], name: str | None = None) -> str:
    """What a call looks like: of this tool, or of the first one."""
    tool = next((tool for tool in tools if tool.name == name), tools[0] if tools else _SOME_TOOL)
    return "".join(syntax.write(example(tool)))
