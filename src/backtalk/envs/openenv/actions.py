"""What an OpenEnv environment lets one do, as tools: its MCP tools, or the fields of its action schema."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from backtalk.envs.tool_schemas import plain_schema, resolve_reference
from backtalk.errors import ConfigError
from backtalk.messages import ToolSpec


@dataclass(frozen=True, slots=True)
class Action:
    """A tool, and the fields of its action that are not the policy's to choose; of an MCP tool, None."""

    tool: ToolSpec
    fixed: Mapping[str, Any] | None


def is_tool_environment(schema: Mapping[str, Any]) -> bool:
    """Whether actions of this schema are calls of MCP tools: CallToolAction, or the bare Action with no fields."""
    kinds = [_fields(branch).get("type", {}).get("const") for branch in _branches(schema)]
    return "call_tool" in kinds or not any(_fields(branch) for branch in _branches(schema))


def typed_actions(schema: Mapping[str, Any], name: str) -> tuple[Action, ...]:
    """One tool called ``name`` with the schema's fields as its arguments; of a union of schemas, one for each.

    Raises:
        ConfigError: the schema has no fields to fill in, or gives two tools one name.
    """
    branches = _branches(schema)
    actions = [_typed(branch, schema, name if len(branches) == 1 else None) for branch in branches]
    names = [action.tool.name for action in actions]
    if len(set(names)) < len(names) or not any(_fields(branch) for branch in branches):
        raise ConfigError(
            f"the server's action schema gives the tools {names}, of which two have one name or none has a field; "
            "it has to be an object with fields, or a union of such objects"
        )
    return tuple(actions)


def mcp_actions(listed: Iterable[Mapping[str, Any]]) -> tuple[Action, ...]:
    """The tools of an MCP environment, from what ``list_tools`` gave."""
    actions = []
    for tool in listed:
        schema = tool.get("input_schema") or tool.get("inputSchema") or {"type": "object", "properties": {}}
        text = str(tool.get("description") or f"Call {tool['name']}.")
        actions.append(Action(ToolSpec(str(tool["name"]), cleandoc(text), plain_schema(schema, schema)), None))
    return tuple(actions)


def _typed(branch: Mapping[str, Any], schema: Mapping[str, Any], name: str | None) -> Action:
    fields = _fields(branch)
    fixed = {field: inner["const"] for field, inner in fields.items() if "const" in inner}
    title = str(branch.get("title", "Action"))
    spelled = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", title.removesuffix("Action") or title).lower()
    parameters = {
        **{key: value for key, value in branch.items() if key in ("type", "required", "additionalProperties")},
        "properties": {field: plain_schema(inner, schema) for field, inner in fields.items() if field not in fixed},
    }
    if "required" in parameters:
        parameters["required"] = [field for field in parameters["required"] if field in parameters["properties"]]
    text = str(branch.get("description") or "Take an action in the environment.")
    tool = name or next((str(value) for value in fixed.values()), re.sub(r"\W+", "_", spelled))
    return Action(ToolSpec(tool, cleandoc(text), parameters), fixed)


def _branches(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The object schemas that an action may be of."""
    schema = resolve_reference(schema, schema)
    union = schema.get("oneOf") or schema.get("anyOf") or [schema]
    return [resolve_reference(branch, schema) for branch in union if isinstance(branch, Mapping)]


def _fields(branch: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What there is to fill in; ``metadata`` is a field of every OpenEnv action, and not the policy's."""
    found = branch.get("properties")
    fields = found.items() if isinstance(found, Mapping) else ()
    return {name: inner for name, inner in fields if name != "metadata" and isinstance(inner, Mapping)}
