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

# Types of parts that do not belong to the answer, and the fields in which servers and data sets put reasoning.
THOUGHTS = ("thinking", "reasoning", "redacted_thinking", "reasoning.text", "summary_text", "reasoning_text")
_REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_text")
_BLOCKS = ("content", "thinking_blocks", "reasoning_details", "reasoning", "thinking", "summary")


def content_text(content: Any, what: str = "a message") -> str:
    """Return the text of a message's content: a text, null, a part or a list of parts; thinking is left out.

    Raises:
        DataError: a part that is neither text nor thinking, or content of another type.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{what} has content of type {type(content).__name__}; only text can be read")
    return "".join(_part_text(part, what) for part in content)


def _part_text(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    kind: Any = type(part).__name__
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind in THOUGHTS or part.get("thought") is True:
            return ""
        for name in ("text", "refusal"):
            found = part.get(name)
            found = found.get("value") if isinstance(found, Mapping) else found  # as OpenAI's assistants wrote it
            if isinstance(found, str):
                return found
    raise DataError(f"{what} holds {kind!r}; only text can be read")


def reasoning_text(message: Mapping[str, Any]) -> str:
    """Return a message's reasoning, from the fields in which servers put it or from its thinking parts."""
    for fields in (message, message.get("provider_specific_fields") or {}):
        for name in _REASONING:
            if isinstance(fields.get(name), str) and fields[name]:
                return fields[name]
    for name in _BLOCKS:
        thoughts = [_thought(part) for part in _mappings(message.get(name))]
        if any(thoughts):
            return "\n".join(filter(None, thoughts))
    return ""


def _thought(part: Mapping[str, Any]) -> str:
    """Return the text of a part that is thinking; an empty one for other parts, and where it is encrypted."""
    if part.get("type") not in THOUGHTS and part.get("thought") is not True:
        return ""
    found = next((part[name] for name in ("thinking", "reasoning", "text") if part.get(name)), "")
    return found if isinstance(found, str) else "".join(str(inner.get("text") or "") for inner in _mappings(found))


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, (list, tuple)) else []


def _unpacked(value: Any) -> Any:
    """Return a value that may be JSON in a text, read; other texts as they are."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value


def read_call(call: Any, what: str = "a tool call") -> tuple[ToolCall, str | None]:
    """Return one of a message's tool calls, and its id if it has one.

    Raises:
        DataError: it has no tool name, or its arguments are not a JSON object.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DataError(f"{what} names no tool: {str(call)[:80]!r}")
    arguments = next((function[key] for key in ("arguments", "input", "args") if function.get(key) is not None), None)
    identifier = call.get("id")
    try:
        if isinstance(arguments, str):
            text = arguments.strip() or "{}"
            arguments, end = read_json(text)
            if text[end:]:
                raise ValueError(f"{text[end : end + 24]!r} follows it")
            if isinstance(arguments, str):  # JSON in JSON
                arguments = json.loads(arguments)
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
    content = message.get("content")
    used = [part for part in _mappings(content) if part.get("type") == "tool_use"]
    content = [part for part in content if part not in used] if used and isinstance(content, (list, tuple)) else content
    text = clean_text(content_text(content) or content_text(message.get("refusal")))
    calls, call_ids = list[ToolCall](), list[str | None]()
    written = _unpacked(message.get("tool_calls")) or _unpacked(message.get("function_call"))
    for raw in [*filter(None, map(_unpacked, written if isinstance(written, list) else [written])), *used]:
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
