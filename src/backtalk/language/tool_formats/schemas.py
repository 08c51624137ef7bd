"""Describe tools for chat templates and policies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from backtalk.errors import ConfigError
from backtalk.messages import ToolSpec


def refuse_control_tokens(tools: Sequence[ToolSpec], controls: Iterable[str]) -> None:
    """Refuse tools whose descriptions contain a control token, as chat templates write descriptions unchanged.

    Raises:
        ConfigError: a name, a description or a schema holds the spelling of a control token.
    """
    for tool in tools:
        description = json.dumps([tool.name, tool.description, dict(tool.parameters)], ensure_ascii=False)
        for token in controls:
            if token in description:
                raise ConfigError(f"tool {tool.name!r} holds {token!r}, a control token of this model; reword the tool")


def tool_schemas(tools: Sequence[ToolSpec]) -> list[dict[str, object]]:
    """Return tools as ``apply_chat_template(tools=...)`` takes them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools
    ]


def tools_text(tools: Sequence[ToolSpec], calls: str) -> str:
    """Return instructions that list the tools, one JSON line each."""
    lines = "\n".join(json.dumps(schema) for schema in tool_schemas(tools))
    return f"You can call these tools, {calls} in each reply:\n{lines}"
