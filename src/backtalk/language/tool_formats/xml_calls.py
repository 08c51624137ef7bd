"""Tool calls in the format of Qwen3-Coder and Qwen3.5.

    <tool_call>
    <function=bash>
    <parameter=command>
    ls -la
    </parameter>
    </function>
    </tool_call>

A value is plain text between two line ends. It can hold any mark but ``</parameter>``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

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
from backtalk.language.tool_formats.values import argument_schemas, excerpt, format_value, parse_value
from backtalk.messages import ToolCall, clean_text

_OPEN = re.compile(rf"{CALL_OPEN}|<function=")
_NAME = re.compile(r"[^<>\n]*")
PARAMETER_CLOSE, FUNCTION_CLOSE = "</parameter>", "</function>"


class Qwen3CoderSyntax(Syntax):
    """The format of Qwen3-Coder; missing marks around a complete call are tolerated, with a warning."""

    in_chat_templates = True

    @property
    def openings(self) -> tuple[str, ...]:
        return (CALL_OPEN, "<function=")

    @property
    def closings(self) -> tuple[str, ...]:
        return (CALL_CLOSE,)

    def _opening(self) -> re.Pattern[str]:
        return _OPEN

    def _read_call(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        cursor = _Cursor(reply.text, reply.stopped, match.start())
        wrapped = cursor.take(CALL_OPEN)
        if not wrapped:
            reading.warn(f"<function=...> without {CALL_OPEN}")
        if not cursor.take("<function="):
            self._expected(cursor, "<function=...>", CALL_CLOSE)
        tool = cursor.name("<function=", FUNCTION_CLOSE)
        schemas = next((argument_schemas(spec) for spec in self.tools if spec.name == tool), {})
        arguments: dict[str, Any] = {}
        while cursor.take("<parameter="):
            name = cursor.name("<parameter=", PARAMETER_CLOSE)
            if name in arguments:
                raise Unreadable(
                    f"the parameter {excerpt(name)} comes twice in one call; write each once", cursor.position
                )
            arguments[name] = self._value(cursor, name, schemas)
        self._close(cursor, reading, wrapped=wrapped)
        return ToolCall(tool, arguments), cursor.position

    def _value(self, cursor: _Cursor, name: str, schemas: Mapping[str, Any]) -> Any:
        end = cursor.text.find(PARAMETER_CLOSE, cursor.position)
        if end < 0:
            raise Unreadable(unclosed(f"<parameter={name}>", PARAMETER_CLOSE, cursor.stopped))
        text = cursor.text[cursor.position : end].removeprefix("\n").removesuffix("\n")
        cursor.position = end + len(PARAMETER_CLOSE)
        return parse_value(text, schemas.get(name))

    def _close(self, cursor: _Cursor, reading: Reading, *, wrapped: bool) -> None:
        """Read the closing marks; a missing one is a warning if the call is complete without it."""
        function_closed, call_closed = cursor.take(FUNCTION_CLOSE), cursor.take(CALL_CLOSE)
        whole = cursor.stopped and cursor.comes(CALL_OPEN, "<function=")
        if not (function_closed or call_closed or whole):
            self._expected(cursor, f"<parameter=...> or {FUNCTION_CLOSE}", FUNCTION_CLOSE)
        if not function_closed:
            reading.warn(f"<function=...> was not closed with {FUNCTION_CLOSE}")
        if wrapped and not call_closed:
            reading.warn(f"{CALL_OPEN} was not closed with {CALL_CLOSE}")

    def _expected(self, cursor: _Cursor, wanted: str, closing: str) -> NoReturn:
        """Raise Unreadable for a mark that is not at the cursor."""
        if not cursor.stopped and closing not in cursor.text[cursor.position :]:
            raise Unreadable(unclosed(wanted, closing, cursor.stopped))
        got = excerpt(cursor.text, cursor.position) if cursor.position < len(cursor.text) else "the end of the reply"
        position = f"at character {cursor.position} of the reply"
        raise Unreadable(f"expected {wanted} {position}, got {got}; write\n{self.example()}", cursor.position)

    def write(self, call: ToolCall) -> list[str]:
        pieces: list[str] = [Mark(CALL_OPEN), "\n", Mark(f"<function={call.tool}>"), "\n"]
        for name, value in call.arguments.items():
            opening, closing = Mark(f"<parameter={name}>"), Mark(PARAMETER_CLOSE)
            pieces += [opening, f"\n{format_value(value)}\n", closing, "\n"]
        return [*pieces, Mark(FUNCTION_CLOSE), "\n", Mark(CALL_CLOSE)]

    def instructions(self, calls: str) -> str:
        return f"{tools_text(self.tools, calls)}\nWrite a call as\n{self.example()}"

    def is_explained_in(self, template: str) -> bool:
        return "<function=" in template


@dataclass(slots=True)
class _Cursor:
    """A position in a reply."""

    text: str
    stopped: bool
    position: int

    def take(self, mark: str) -> bool:
        """Skip white space and then this mark; return whether it was there."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        found = self.text.startswith(mark, self.position)
        self.position += len(mark) if found else 0
        return found

    def comes(self, *marks: str) -> bool:
        """Return whether one of these marks is at the cursor, or the end of the reply."""
        return self.position >= len(self.text) or self.text.startswith(marks, self.position)

    def name(self, opening: str, closing: str) -> str:
        match = _NAME.match(self.text, self.position)
        end = match.end() if match else self.position
        name = self.text[self.position : end].strip()
        if not self.text.startswith(">", end):
            if end == len(self.text) and not self.stopped:
                raise Unreadable(unclosed(opening, closing, self.stopped))
            raise Unreadable(
                f"{excerpt(self.text, self.position - len(opening))} has no '>' after its name", self.position
            )
        self.position = end + 1
        return clean_text(name)
