"""Read messages of OpenAI's chat format as servers, agents and data sets write them.

Content may be a text or a list of parts, some of them thinking; the arguments of a call JSON text or an object; fields
may be null or missing. All else is a DataError, which each caller handles in its own way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backtalk.errors import DataError
from backtalk.language.tool_formats.reply import call_text
from backtalk.language.tool_formats.values import clean_value, read_json
from backtalk.messages import ToolCall, clean_text

_THINKING = ("thinking", "reasoning", "redacted_thinking")  # types of parts that do not belong to the answer


def content_text(content: Any, what: str = "a message") -> str:
    """Return the text of a message's content: a text, null, or a list of parts; thinking is left out.

    Raises:
        DataError: a part that is neither text nor thinking, or content of another type.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{what} has content of type {type(content).__name__}; only text can be read")
    return "".join(_part_text(part, what) for part in content)


def _part_text(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    kind: Any = type(part).__name__
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind in _THINKING:
            return ""
        for name in ("text", "refusal"):
            if isinstance(part.get(name), str):
                return part[name]
    raise DataError(f"{what} holds {kind!r}; only text can be read")


def reasoning_text(message: Mapping[str, Any]) -> str:
    """Return a message's reasoning, from the fields in which servers put it or from its thinking parts."""
    for name in ("reasoning_content", "reasoning"):
        if message.get(name):
            return str(message[name])
    content = message.get("content")
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, (list, tuple)) else []
    thoughts = [part.get("thinking") or part.get("text") for part in parts if part.get("type") in _THINKING]
    return "\n".join(content_text(thought, "a thought") for thought in thoughts)


def read_call(call: Any, what: str = "a tool call") -> tuple[ToolCall, str | None]:
    """Return one of a message's tool calls, and its id if it has one.

    Raises:
        DataError: it has no tool name, or its arguments are not a JSON object.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DataError(f"{what} names no tool: {str(call)[:80]!r}")
    arguments, identifier = function.get("arguments"), call.get("id")
    try:
        if isinstance(arguments, str):
            text = arguments.strip() or "{}"
            arguments, end = read_json(text)
            if text[end:]:
                raise ValueError(f"{text[end : end + 24]!r} follows it")
        arguments = {} if arguments is None else clean_value(arguments)
    except ValueError as error:
        raise DataError(f"{what} has arguments that are not JSON ({error}): {str(arguments)[:80]!r}") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{what} has arguments that are no object: {str(arguments)[:80]!r}")
    return ToolCall(clean_text(name), arguments), None if identifier is None else clean_text(str(identifier))


def _raw_call_text(call: Any) -> str:
    """Return as text a call that read_call refuses."""
    function = call.get("function") or call if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        return clean_text(str(function))
    return call_text(function.get("name") or "", function.get("arguments") or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantMessage:
    """An assistant's message: its text, its calls with their ids, and its reasoning."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_ids: tuple[str | None, ...] = ()
    reasoning: str = ""


def read_assistant(message: Mapping[str, Any]) -> AssistantMessage:
    """Return an assistant's message, in which a call that cannot be read is appended to the text.

    Raises:
        DataError: content that is not text.
    """
    text = clean_text(content_text(message.get("content")) or content_text(message.get("refusal")))
    calls, call_ids = list[ToolCall](), list[str | None]()
    written = message.get("tool_calls") or message.get("function_call")
    for raw in filter(None, written if isinstance(written, list) else [written]):
        try:
            call, call_id = read_call(raw)
        except DataError:
            text = f"{text}\n{_raw_call_text(raw)}".strip()
        else:
            calls.append(call)
            call_ids.append(call_id)
    return AssistantMessage(text=text, calls=tuple(calls), call_ids=tuple(call_ids), reasoning=reasoning_text(message))


def write_call(call: ToolCall, call_id: str) -> dict[str, Any]:
    """Return a tool call as a message holds it, its arguments as a JSON text."""
    function = {"name": call.tool, "arguments": json.dumps(dict(call.arguments))}
    return {"id": call_id, "type": "function", "function": function}
