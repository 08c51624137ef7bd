"""Which format a policy writes, and the object that reads and writes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from backtalk.language.tool_formats.base import Syntax, ToolFormat
from backtalk.language.tool_formats.json_calls import HermesSyntax, Llama3Syntax
from backtalk.language.tool_formats.text_calls import BashBlockSyntax, PlainSyntax, TagsSyntax
from backtalk.language.tool_formats.xml_calls import Qwen3CoderSyntax
from backtalk.messages import ToolSpec


def tag_tokens(tools: Sequence[ToolSpec]) -> list[str]:
    """The tags of all tools."""
    return [tag for tool in tools for tag in (f"<{tool.name}>", f"</{tool.name}>")]


def detect_format(template: str, control_tokens: Collection[str], tools: Sequence[ToolSpec]) -> ToolFormat:
    """The format that a model was made for, from its chat template's source and its control tokens.

    Tokens for every tool's tags: tags. A template that writes ``<function=``: Qwen3-Coder's. Llama 3's header tokens:
    its JSON. All others, with ``<tool_call>`` in their template or without: Hermes, told to the policy where the
    template does not teach it.
    """
    if tools and all(tag in control_tokens for tag in tag_tokens(tools)):
        return ToolFormat.TAGS
    if "<function=" in template:
        return ToolFormat.QWEN3_CODER
    if "<|start_header_id|>" in control_tokens:
        return ToolFormat.LLAMA3_JSON
    return ToolFormat.HERMES


def open_syntax(tool_format: ToolFormat, tools: Sequence[ToolSpec], control_tokens: Collection[str] = ()) -> Syntax:
    """The format for these tools.

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
