"""Tool formats whose calls have one argument as plain text: tags, fenced blocks, and a reply that is a command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backtalk.errors import ConfigError
from backtalk.language.tool_formats.base import (
    Mark,
    Reading,
    Reply,
    Syntax,
    ToolFormat,
    Unreadable,
    no_call_problem,
    skip_leading_thinking,
    unclosed,
)
from backtalk.language.tool_formats.values import argument_schemas, excerpt, format_value, parse_value
from backtalk.messages import ToolCall, ToolSpec

SHELLS = ("bash", "sh", "shell")


def only_arguments(tools: Sequence[ToolSpec], tool_format: ToolFormat) -> dict[str, str]:
    """Return the name of each tool's only argument, by tool name.

    Raises:
        ConfigError: a tool takes no or several arguments, which bare text cannot hold.
    """
    arguments: dict[str, str] = {}
    for tool in tools:
        known = list(argument_schemas(tool))
        if len(known) != 1:
            raise ConfigError(
                f"tool {tool.name!r} takes {len(known)} arguments {known}, and a call in the format "
                f"{tool_format.value!r} holds exactly one; use tool_format={ToolFormat.HERMES.value!r}"
            )
        arguments[tool.name] = known[0]
    return arguments


def command_tool(tools: Sequence[ToolSpec], tool_format: ToolFormat) -> str:
    """Return the name of the tool that runs commands: its argument is "command", or its name is that of a shell.

    Raises:
        ConfigError: there is none.
    """
    arguments = only_arguments(tools, tool_format)
    found = [tool for tool, argument in arguments.items() if argument == "command"]
    found += [tool for tool in arguments if tool in SHELLS]
    if not found:
        raise ConfigError(
            f"none of the tools {list(arguments)} has an argument named 'command', so tool_format="
            f"{tool_format.value!r} has nothing to run commands with; use tool_format={ToolFormat.HERMES.value!r}"
        )
    return found[0]


def _make_call(tools: Sequence[ToolSpec], name: str, text: str) -> ToolCall:
    known: Mapping[str, Any] = next(argument_schemas(tool) for tool in tools if tool.name == name)
    return ToolCall(name, {argument: parse_value(text, schema) for argument, schema in known.items()})


def _only_argument(call: ToolCall) -> str:
    (value,) = call.arguments.values()
    return format_value(value)


@dataclass(frozen=True)
class TagsSyntax(Syntax):
    """The format ``<bash>ls</bash>``. If tags are control tokens, only those count; else no argument can hold a tag."""

    marks_are_tokens: bool = False

    def __post_init__(self) -> None:
        only_arguments(self.tools, ToolFormat.TAGS)

    @property
    def _names(self) -> str:
        return "|".join(re.escape(tool.name) for tool in self.tools) or r"(?!)"

    @property
    def openings(self) -> tuple[str, ...]:
        return tuple(f"<{tool.name}>" for tool in self.tools)

    @property
    def closings(self) -> tuple[str, ...]:
        return tuple(f"</{tool.name}>" for tool in self.tools)

    def _opening(self) -> re.Pattern[str]:
        return re.compile(f"<({self._names})>")

    def _read_call(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        opening, closing = match[0], f"</{match[1]}>"
        for tag in re.compile(f"</?({self._names})>").finditer(reply.text, match.end()):
            if reply.marks is not None and tag.start() not in reply.marks:
                continue
            if tag[0] == closing:
                return _make_call(self.tools, match[1], reply.text[match.end() : tag.start()]), tag.end()
            raise Unreadable(f"{opening} is followed by {tag[0]}; close it with {closing}", tag.start())
        raise Unreadable(unclosed(opening, closing, reply.stopped))

    def write(self, call: ToolCall) -> list[str]:
        return [Mark(f"<{call.tool}>"), _only_argument(call), Mark(f"</{call.tool}>")]

    def is_explained_in(self, template: str) -> bool:
        return self.marks_are_tokens  # a model with such tokens was trained on them


class BashBlockSyntax(Syntax):
    """The format of a fenced block whose language names the tool; ``bash``, ``sh``, ``shell`` name that for commands.

    As in Markdown, a fence may have more than three backticks and then holds shorter ones: a block can hold any text.
    Prose before a block is part of the format; prose after the last block is not.
    """

    has_prose = True

    def __post_init__(self) -> None:
        command_tool(self.tools, ToolFormat.BASH_BLOCK)

    @property
    def _by_language(self) -> dict[str, str]:
        shells = dict.fromkeys(SHELLS, command_tool(self.tools, ToolFormat.BASH_BLOCK))
        return shells | {tool.name: tool.name for tool in self.tools}

    @property
    def closings(self) -> tuple[str, ...]:
        return ("```",)

    def _opening(self) -> re.Pattern[str]:
        languages = "|".join(map(re.escape, self._by_language))
        return re.compile(rf"^[ ]{{0,3}}(`{{3,}})[ \t]*({languages})[ \t\r]*$", re.MULTILINE)

    def _read_call(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        fence, language, start = match[1], match[2], match.end() + 1
        closing = re.compile(rf"^[ ]{{0,3}}`{{{len(fence)},}}[ \t\r]*$", re.MULTILINE).search(reply.text, start)
        if closing is None:
            raise Unreadable(unclosed(fence + language, fence, reply.stopped))
        body = reply.text[start : max(start, closing.start() - 1)]
        return _make_call(self.tools, self._by_language[language], body), closing.end()

    def write(self, call: ToolCall) -> list[str]:
        text = _only_argument(call)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return [f"{fence}{call.tool}\n{text}\n{fence}"]


class PlainSyntax(Syntax):
    """The format in which the whole reply is a command, or another tool's name and its argument, as ``submit 42``.

    A reply cannot hold two calls, or a command that begins with another tool's name.
    """

    def __post_init__(self) -> None:
        command_tool(self.tools, ToolFormat.PLAIN)

    @property
    def _command(self) -> str:
        return command_tool(self.tools, ToolFormat.PLAIN)

    @property
    def _others(self) -> list[ToolSpec]:
        return [tool for tool in self.tools if tool.name != self._command]

    def read(self, reply: Reply) -> Reading:
        reading = Reading()
        try:
            text = reply.text[skip_leading_thinking(reply, reading) :]
            if not reply.stopped:
                raise Unreadable(f"cut at the token limit, and a command is run only whole, got {excerpt(text)}")
            if not text.strip():
                shapes = ["a command", *(self.example(tool.name) for tool in self._others)]
                raise Unreadable(no_call_problem(reply, " or ".join(shapes)))
            name, argument = self._command, text
            for tool in self._others:
                if match := re.match(rf"{re.escape(tool.name)}(?:\s(.*))?\Z", text, re.DOTALL):
                    name, argument = tool.name, match[1] or ""
                    break
            reading.calls.append(_make_call(self.tools, name, argument))
        except Unreadable as problem:
            reading.problem = str(problem)
        return reading

    def write(self, call: ToolCall) -> list[str]:
        return [_only_argument(call) if call.tool == self._command else f"{call.tool} {_only_argument(call)}"]

    def instructions(self, calls: str) -> str:
        others = "".join(
            f"\nReply {self.example(tool.name)} to call {tool.name}: {tool.description}" for tool in self._others
        )
        return f"Reply with one shell command and nothing else: the whole reply is run.{others}"
