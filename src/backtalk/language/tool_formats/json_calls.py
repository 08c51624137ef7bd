"""Tool calls as JSON, in the Hermes format (Nous Research's, also Qwen's) and in Llama 3's; both can hold any text."""

from __future__ import annotations

import re

from backtalk.language.tool_formats.base import (
    CALL_CLOSE,
    CALL_OPEN,
    Mark,
    Reading,
    Reply,
    Syntax,
    Unreadable,
    unclosed,
)
from backtalk.language.tool_formats.schemas import tools_text
from backtalk.language.tool_formats.values import JsonError, excerpt, read_json, write_json
from backtalk.messages import ToolCall

# An object that begins with a key, at the start of a line or after a semicolon; or whatever follows the tag.
_LLAMA_OPEN = re.compile(r'<\|python_tag\|>\s*|(?:\A|(?<=[\n;>]))[^\S\n]*(?=\{\s*")')


class HermesSyntax(Syntax):
    """The format ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, with any white space around the JSON."""

    in_chat_templates = True

    @property
    def openings(self) -> tuple[str, ...]:
        return (CALL_OPEN,)

    @property
    def closings(self) -> tuple[str, ...]:
        return (CALL_CLOSE,)

    def _opening(self) -> re.Pattern[str]:
        return re.compile(re.escape(CALL_OPEN))

    def _read_call(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        text = reply.text
        start = _skip_space(text, match.end())
        if not reply.stopped and start == len(text):
            raise Unreadable(unclosed(CALL_OPEN, CALL_CLOSE, reply.stopped))
        try:
            call, end = _parse_call(text, start, self)
        except ValueError as error:
            if not reply.stopped and CALL_CLOSE not in text[start:]:
                raise Unreadable(unclosed(CALL_OPEN, CALL_CLOSE, reply.stopped)) from None
            raise Unreadable(_not_json(error, self), error.at if isinstance(error, JsonError) else start) from None
        end = _skip_space(text, end)
        if text.startswith(CALL_CLOSE, end):
            return call, end + len(CALL_CLOSE)
        cut = CALL_CLOSE.startswith(text[end:])  # the end of the reply, or a piece of the mark
        if not cut and not text.startswith(CALL_OPEN, end):
            raise Unreadable(f"the JSON of the tool call is followed by {excerpt(text, end)}, not by {CALL_CLOSE}", end)
        reading.warn(f"{CALL_OPEN} was not closed with {CALL_CLOSE}")  # but the call is complete
        return call, len(text) if cut else end

    def write(self, call: ToolCall) -> list[str]:
        body = write_json({"name": call.tool, "arguments": dict(call.arguments)})
        return [Mark(CALL_OPEN), f"\n{body}\n", Mark(CALL_CLOSE)]

    def instructions(self, calls: str) -> str:
        return f"{tools_text(self.tools, calls)}\nWrite a call as {self.example()}."

    def is_explained_in(self, template: str) -> bool:
        foreign = ("<function=", "<parameter=", "<arg_key>")  # formats that share the outer mark
        return CALL_OPEN in template and not any(mark in template for mark in foreign)


class Llama3Syntax(Syntax):
    """The format ``{"name": ..., "parameters": {...}}``, with or without ``<|python_tag|>`` before it.

    Calls are separated by ``;`` or a line end. A call begins at the start of a line: braces inside a line are prose.
    """

    in_chat_templates = True
    between = ";"

    def _opening(self) -> re.Pattern[str]:
        return _LLAMA_OPEN

    def _read_call(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        try:
            return _parse_call(reply.text, match.end(), self)
        except ValueError as error:
            if not reply.stopped:
                raise Unreadable("cut at the token limit before the tool call was closed") from None
            raise Unreadable(_not_json(error, self)) from None

    def write(self, call: ToolCall) -> list[str]:
        return [write_json({"name": call.tool, "parameters": dict(call.arguments)})]

    def instructions(self, calls: str) -> str:
        return f"{tools_text(self.tools, calls)}\nWrite a call on a line of its own, as {self.example()}"

    def is_explained_in(self, template: str) -> bool:
        return '"parameters"' in template and CALL_OPEN not in template


def _parse_call(text: str, start: int, syntax: Syntax) -> tuple[ToolCall, int]:
    """Return a call and the end position of its JSON; both formats may use "arguments" or "parameters"."""
    value, end = read_json(text, start)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Unreadable(f'the tool call has no "name", got {excerpt(text, start)}; write {syntax.example()}', end)
    key = "arguments" if "arguments" in value else "parameters"
    arguments = value.get(key, {})
    if not isinstance(arguments, dict):
        raise Unreadable(f'the "{key}" of the tool call are not a JSON object; write {syntax.example()}', end)
    return ToolCall(value["name"], arguments), end


def _skip_space(text: str, start: int) -> int:
    """Return the position of the first character from ``start`` on that is not white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _not_json(error: ValueError, syntax: Syntax) -> str:
    return f"the tool call is not valid JSON: {error}; write {syntax.example()}"
