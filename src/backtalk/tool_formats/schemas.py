"""Tools as chat templates and policies are told about them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from backtalk.envs.base import ToolSpec
from backtalk.tool_formats.base import Syntax
from backtalk.tool_formats.values import example

_SOME_TOOL = ToolSpec("tool", "", {"properties": {"argument": {"type": "string"}}})


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
