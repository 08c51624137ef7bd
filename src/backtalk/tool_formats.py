"""How a policy writes a tool call, and how one is read back out of what it sampled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from backtalk.envs.base import ToolCall, ToolSpec
from backtalk.errors import ConfigError


class ToolFormat(StrEnum):
    """The way a policy writes a call."""

    TAGS = "tags"  # <bash>ls -la</bash>: the tag names the tool, the body is its one argument
    HERMES = "hermes"  # <tool_call>\n{"name": "bash", "arguments": {"command": "ls -la"}}\n</tool_call>


@dataclass(frozen=True, slots=True)
class Tag:
    """``<tool>`` or ``</tool>`` in what a policy wrote."""

    tool: str
    closing: bool = False

    def __str__(self) -> str:
        return f"</{self.tool}>" if self.closing else f"<{self.tool}>"


CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_HERMES_SHAPE = f'{CALL_OPEN}{{"name": ..., "arguments": {{...}}}}{CALL_CLOSE}'


def tag_arguments(tools: Sequence[ToolSpec]) -> dict[str, str]:
    """The one argument of each tool, by tool name.

    Raises:
        ConfigError: a tool takes no or several arguments, which a tag's body cannot hold.
    """
    arguments: dict[str, str] = {}
    for tool in tools:
        names = list(tool.parameters.get("properties", {}))
        if len(names) != 1:
            raise ConfigError(
                f"tool {tool.name!r} takes {len(names)} arguments {names}, and the body of a <{tool.name}> tag holds "
                "exactly one; use tool_format=ToolFormat.HERMES"
            )
        arguments[tool.name] = names[0]
    return arguments


def split_tags(text: str, tools: Sequence[str]) -> list[str | Tag]:
    """Text cut at the tags of ``tools``: for a tokenizer that has no token of its own for them."""
    spans: list[str | Tag] = []
    position = 0
    for match in re.finditer("<(/?)(" + "|".join(map(re.escape, tools)) + ")>", text) if tools else ():
        spans += [text[position : match.start()], Tag(match[2], closing=bool(match[1]))]
        position = match.end()
    return [*spans, text[position:]]


def parse_tags(spans: Sequence[str | Tag], arguments: Mapping[str, str], *, stopped: bool) -> ToolCall | str:
    """The first call, or what to tell the policy. Text around the call is let be."""
    first = next((i for i, span in enumerate(spans) if isinstance(span, Tag) and not span.closing), None)
    if first is None:
        example = next(iter(arguments), "tool")
        return f"[no tool call; write <{example}>...</{example}>]"
    opening = spans[first]
    assert isinstance(opening, Tag)
    body: list[str] = []
    for span in spans[first + 1 :]:
        if span == Tag(opening.tool, closing=True):
            return ToolCall(opening.tool, {arguments[opening.tool]: "".join(body)})
        if isinstance(span, Tag):
            return f"[{opening} is followed by {span}; close it with </{opening.tool}>]"
        body.append(span)
    return _unfinished(str(opening), f"</{opening.tool}>", stopped)


def parse_hermes(text: str, *, stopped: bool, thinking: bool = False) -> ToolCall | str:
    """The first call after any thinking, or what to tell the policy. Text around the call is let be.

    ``thinking`` says that the template had opened ``<think>`` already.
    """
    if thinking or text.lstrip().startswith(THINK_OPEN):
        _, closed, text = text.partition(THINK_CLOSE)
        if not closed:
            return _unfinished(THINK_OPEN, THINK_CLOSE, stopped)
    _, opened, body = text.partition(CALL_OPEN)
    if not opened:
        return f"[no tool call; write {_HERMES_SHAPE}]"
    body = body.lstrip()
    try:
        call, end = json.JSONDecoder().raw_decode(body)  # stops by itself, so a string may hold any tag
    except (ValueError, RecursionError):
        if not stopped and CALL_CLOSE not in body:
            return _unfinished(CALL_OPEN, CALL_CLOSE, stopped)
        return f"[the tool call is not valid JSON; write {_HERMES_SHAPE}]"
    if not body[end:].lstrip().startswith(CALL_CLOSE):
        return _unfinished(CALL_OPEN, CALL_CLOSE, stopped)
    return _hermes_call(call)


def _hermes_call(call: object) -> ToolCall | str:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return f'[the tool call has no "name"; write {_HERMES_SHAPE}]'
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return f'[the "arguments" of the tool call are not a JSON object; write {_HERMES_SHAPE}]'
    return ToolCall(call["name"], {name: x if isinstance(x, str) else json.dumps(x) for name, x in arguments.items()})


def _unfinished(opening: str, closing: str, stopped: bool) -> str:
    return f"[{opening} was not closed with {closing}]" if stopped else f"[cut at the token limit before {closing}]"


def hermes_json(call: ToolCall) -> str:
    return json.dumps({"name": call.tool, "arguments": dict(call.arguments)}, ensure_ascii=False)


def hermes_schema(tool: ToolSpec) -> dict[str, object]:
    """A tool as chat templates expect it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def hermes_instructions(tools: Sequence[ToolSpec]) -> str:
    """What a policy is told about its tools where the chat template says nothing of them."""
    listed = "\n".join(json.dumps(hermes_schema(tool)) for tool in tools)
    return f"You can call these tools, one call in each reply:\n{listed}\nWrite a call as {_HERMES_SHAPE}."
