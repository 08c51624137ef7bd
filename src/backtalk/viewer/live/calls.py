"""Read an action as people do: thinking, what was said, and tool calls. Only for showing: it decides no role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from backtalk.errors import ConfigError
from backtalk.language.tool_formats import ToolFormat, make_syntax
from backtalk.language.tool_formats.base import CALL_OPEN, THINK_CLOSE, THINK_OPEN, Reply
from backtalk.messages import ToolCall, ToolSpec

_TAG = re.compile(r"<([A-Za-z_][\w.-]*)>")
_FENCE = re.compile(r"^`{3,}[ \t]*(\w+)[ \t]*$", re.MULTILINE)
_NO_TOOLS = {"think", "tool_call", "tool_response", "answer_format"}


def read_action(text: str, tool_format: str | None = None, tools: Iterable[str] = ()) -> dict[str, Any]:
    """Return thinking, text before the first call, and the calls of an action; what is not there is left out.

    ``tool_format`` is tried first, then every other that its marks suggest. ``tools`` are names of known tools.
    """
    thinking, rest = _split_thinking(text)
    for chosen, names in _candidates(rest, tool_format, list(tools)):
        specs = [ToolSpec(name, "", {"properties": {_argument(name): {"type": "string"}}}) for name in names]
        try:
            calls = make_syntax(chosen, specs).read(Reply(rest)).calls
        except (ConfigError, ValueError, RecursionError):
            continue
        if calls:
            shown = {"said": _before_call(rest, chosen, names), "calls": [_plain(call) for call in calls]}
            return {name: value for name, value in {"thinking": thinking, **shown}.items() if value}
    return {name: value for name, value in {"thinking": thinking, "said": rest.strip()}.items() if value}


def _candidates(text: str, given: str | None, tools: list[str]) -> Iterator[tuple[ToolFormat, list[str]]]:
    if given in set(ToolFormat) and given not in (ToolFormat.PLAIN, ToolFormat.BASH_BLOCK):
        yield ToolFormat(given), tools
    if CALL_OPEN in text:
        yield ToolFormat.QWEN3_CODER, []
        yield ToolFormat.HERMES, []
    if text.lstrip().startswith('{"name"'):
        yield ToolFormat.LLAMA3_JSON, []
    tags = [name for name in _TAG.findall(text) if name not in _NO_TOOLS and f"</{name}>" in text]
    if tags:
        yield ToolFormat.TAGS, list(dict.fromkeys(tags))
    if fences := _FENCE.findall(text):
        yield ToolFormat.BASH_BLOCK, list(dict.fromkeys(["bash", *fences]))
    if given == ToolFormat.PLAIN:
        yield ToolFormat.PLAIN, list(dict.fromkeys(["bash", *tools]))


def _argument(tool: str) -> str:
    return "command" if tool in ("bash", "sh", "shell") else "argument"


def _split_thinking(text: str) -> tuple[str, str]:
    head, closed, rest = text.partition(THINK_CLOSE)
    if not closed:
        return "", text
    return head.replace(THINK_OPEN, "", 1).strip(), rest.lstrip("\n")


def _before_call(text: str, chosen: ToolFormat, names: list[str]) -> str:
    marks = {
        ToolFormat.TAGS: [f"<{name}>" for name in names],
        ToolFormat.BASH_BLOCK: ["```"],
        ToolFormat.LLAMA3_JSON: ["{"],
        ToolFormat.PLAIN: [text],
    }.get(chosen, [CALL_OPEN])
    starts = [position for mark in marks if (position := text.find(mark)) >= 0]
    return text[: min(starts, default=0)].strip()


def _plain(call: ToolCall) -> Mapping[str, Any]:
    return {"tool": call.tool, "arguments": dict(call.arguments)}
