"""Formats in which policies write tool calls: parse sampled text into calls, and write calls (docs/tool_formats.md)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from backtalk.language.tool_formats.base import Syntax, ToolFormat
from backtalk.language.tool_formats.json_calls import HermesSyntax, Llama3Syntax
from backtalk.language.tool_formats.text_calls import BashBlockSyntax, PlainSyntax, TagsSyntax
from backtalk.language.tool_formats.xml_calls import Qwen3CoderSyntax
from backtalk.messages import ToolSpec

__all__ = ["Syntax", "ToolFormat", "detect_format", "make_syntax", "tag_tokens"]


def tag_tokens(tools: Sequence[ToolSpec]) -> list[str]:
    """Return the opening and closing tag of each tool."""
    return [tag for tool in tools for tag in (f"<{tool.name}>", f"</{tool.name}>")]


def detect_format(template: str, control_tokens: Collection[str], tools: Sequence[ToolSpec]) -> ToolFormat:
    """Return the format that a model was trained on, by the source of its chat template and its control tokens.

    Control tokens for the tags of all tools mean TAGS, ``<function=`` in the template QWEN3_CODER, the header tokens of
    Llama 3 LLAMA3_JSON. All else is HERMES, which the prompt explains if the template does not.
    """
    if tools and all(tag in control_tokens for tag in tag_tokens(tools)):
        return ToolFormat.TAGS
    if "<function=" in template:
        return ToolFormat.QWEN3_CODER
    if "<|start_header_id|>" in control_tokens:
        return ToolFormat.LLAMA3_JSON
    return ToolFormat.HERMES


def make_syntax(tool_format: ToolFormat, tools: Sequence[ToolSpec], control_tokens: Collection[str] = ()) -> Syntax:
    """Return the reader and writer of a format for these tools.

    Raises:
        ConfigError: the tools do not fit the format.
    """
    match tool_format:
        case ToolFormat.TAGS:
            return TagsSyntax(tools, bool(tools) and all(tag in control_tokens for tag in tag_tokens(tools)))
        case ToolFormat.HERMES:
            return HermesSyntax(tools)
        case ToolFormat.QWEN3_CODER:
            return Qwen3CoderSyntax(tools)
        case ToolFormat.LLAMA3_JSON:
            return Llama3Syntax(tools)
        case ToolFormat.BASH_BLOCK:
            return BashBlockSyntax(tools)
        case ToolFormat.PLAIN:
            return PlainSyntax(tools)
