"""Turns an OpenEnv environment's schemas into tools, and its observations into message parts with token roles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from backtalk.envs.openenv.config import DEFAULT_ROLES, ROLES
from backtalk.envs.tool_schemas import plain_schema, resolve_reference
from backtalk.errors import ConfigError
from backtalk.messages import Part, ToolSpec, truncate_text
from backtalk.trajectory import TokenRole


@dataclass(frozen=True, slots=True)
class Action:
    """A tool, and the action's constant fields, which the policy does not choose. None for a tool called over MCP."""

    tool: ToolSpec
    fixed: Mapping[str, Any] | None


def is_tool_environment(schema: Mapping[str, Any]) -> bool:
    """Tell whether actions of a schema are calls of MCP tools: CallToolAction, or the bare Action without fields."""
    kinds = [_fields(branch).get("type", {}).get("const") for branch in _branches(schema)]
    return "call_tool" in kinds or not any(_fields(branch) for branch in _branches(schema))


def typed_actions(schema: Mapping[str, Any], name: str) -> tuple[Action, ...]:
    """Return a tool called ``name`` with the schema's fields as its arguments; a tool for each member of a union.

    Raises:
        ConfigError: the schema has no fields to fill in, or gives two tools one name.
    """
    branches = _branches(schema)
    actions = [_typed_action(branch, schema, name if len(branches) == 1 else None) for branch in branches]
    names = [action.tool.name for action in actions]
    if len(set(names)) < len(names) or not any(_fields(branch) for branch in branches):
        raise ConfigError(
            f"the server's action schema gives the tools {names}, of which two have one name or none has a field; "
            "it has to be an object with fields, or a union of such objects"
        )
    return tuple(actions)


def mcp_actions(listed: Iterable[Mapping[str, Any]]) -> tuple[Action, ...]:
    """Return the tools of an MCP environment, from the answer to ``list_tools``."""
    actions = []
    for tool in listed:
        schema = tool.get("input_schema") or tool.get("inputSchema") or {"type": "object", "properties": {}}
        text = str(tool.get("description") or f"Call {tool['name']}.")
        actions.append(Action(ToolSpec(str(tool["name"]), cleandoc(text), plain_schema(schema, schema)), None))
    return tuple(actions)


def observation_parts(
    observation: Mapping[str, Any], roles: Mapping[str, str], max_chars: int
) -> tuple[tuple[Part, ...], bool]:
    """Return an observation as parts, and whether some of its text was cut to ``max_chars``.

    ``roles`` are those of ``OpenEnvConfig``. Text is shown unchanged, any other value as JSON. A single field is shown
    without its name; several have their names on lines before them, with role WARNING. Empty fields are not shown.
    """
    fields = _shown_fields(observation, DEFAULT_ROLES | dict(roles), TokenRole.ENV_OUTPUT)
    shown = [(path, found) for path, value, role in fields if (found := _value_parts(value, role))]
    parts: list[Part] = []
    truncated = False
    for path, found in shown:
        label = f"{path}:\n" if len(shown) > 1 else ""
        for part in found:
            own_line = "\n" if parts and not parts[-1].text.endswith("\n") else ""
            if own_line or label:
                parts.append(Part(own_line + label, TokenRole.WARNING))
            parts += truncate_text(part.text, max_chars, part.role)
            label = ""
            truncated |= len(part.text) > max_chars
    return tuple(parts), truncated


def _typed_action(branch: Mapping[str, Any], schema: Mapping[str, Any], name: str | None) -> Action:
    fields = _fields(branch)
    fixed = {field: inner["const"] for field, inner in fields.items() if "const" in inner}
    title = str(branch.get("title", "Action"))
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", title.removesuffix("Action") or title).lower()
    parameters = {
        **{key: value for key, value in branch.items() if key in ("type", "required", "additionalProperties")},
        "properties": {field: plain_schema(inner, schema) for field, inner in fields.items() if field not in fixed},
    }
    if "required" in parameters:
        parameters["required"] = [field for field in parameters["required"] if field in parameters["properties"]]
    text = str(branch.get("description") or "Take an action in the environment.")
    tool = name or next((str(value) for value in fixed.values()), re.sub(r"\W+", "_", snake_case))
    return Action(ToolSpec(tool, cleandoc(text), parameters), fixed)


def _branches(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the object schemas in a union of actions, or the schema itself."""
    schema = resolve_reference(schema, schema)
    union = schema.get("oneOf") or schema.get("anyOf") or [schema]
    return [resolve_reference(branch, schema) for branch in union if isinstance(branch, Mapping)]


def _fields(branch: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the schemas of an action's fields, without ``metadata``, which every OpenEnv action has."""
    found = branch.get("properties")
    fields = found.items() if isinstance(found, Mapping) else ()
    return {name: inner for name, inner in fields if name != "metadata" and isinstance(inner, Mapping)}


def _shown_fields(
    values: Mapping[str, Any], roles: Mapping[str, str], inherited: TokenRole | None, prefix: str = ""
) -> Iterator[tuple[str, Any, TokenRole]]:
    """Yield dotted path, value and role of each field that is shown; enter objects only where a rule names a field."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        role = ROLES[roles[path]] if path in roles else inherited
        if isinstance(value, Mapping) and any(rule.startswith(f"{path}.") for rule in roles):
            yield from _shown_fields(value, roles, role, f"{path}.")
        elif role is not None:
            yield path, value, role


def _value_parts(value: Any, role: TokenRole) -> list[Part]:
    """Return a value as one part, as none if it is empty, and an MCP tool's result as a part for each block."""
    if value is None or value == "" or value == [] or value == {}:
        return []
    if isinstance(value, str):
        return [Part(value, role)]
    blocks = value.get("content") if isinstance(value, Mapping) else None
    if isinstance(blocks, list) and all(isinstance(block, Mapping) and "type" in block for block in blocks):
        return [
            Part(text, role)
            if isinstance(text := block.get("text"), str)
            else Part(f"[{block['type']} left out]", TokenRole.WARNING)
            for block in blocks
            if block.get("text") != ""
        ]
    return [Part(json.dumps(value, ensure_ascii=False), role)]
