"""How a policy writes tool calls, and how they are read back out of what it sampled (docs/tool_formats.md)."""

from __future__ import annotations

from backtalk.language.tool_formats.base import (
    CALL_CLOSE,
    CALL_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    Mark,
    Reply,
    Syntax,
    ToolFormat,
)
from backtalk.language.tool_formats.choose import detect_format, open_syntax, tag_tokens
from backtalk.language.tool_formats.reply import call_text, how_many, parse_reply, write_message, write_reply
from backtalk.language.tool_formats.schemas import refuse_control_tokens, tool_schemas

__all__ = [
    "CALL_CLOSE",
    "CALL_OPEN",
    "THINK_CLOSE",
    "THINK_OPEN",
    "Mark",
    "Reply",
    "Syntax",
    "ToolFormat",
    "call_text",
    "detect_format",
    "how_many",
    "open_syntax",
    "parse_reply",
    "refuse_control_tokens",
    "tag_tokens",
    "tool_schemas",
    "write_message",
    "write_reply",
]
