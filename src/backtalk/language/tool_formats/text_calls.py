"""Formats whose calls hold one bare argument: tags, fenced blocks, and a reply that is nothing but a command."""

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
    ToolFormat,
    Unreadable,
    excerpt,
    no_call,
    skip_leading_thinking,
    unfinished,
    walk,
)
from backtalk.language.tool_formats.schemas import shape
from backtalk.language.tool_formats.values import properties, text_of, value_of
from backtalk.messages import ToolCall, ToolSpec

SHELLS = ("bash", "sh", "shell")


def only_arguments(tools: Sequence[ToolSpec], tool_format: ToolFormat) -> dict[str, str]:
    """The one argument of each tool, by tool name.

    Raises:
        ConfigError: a tool takes no or several arguments, which bare text cannot hold.
    """
    arguments: dict[str, str] = {}
    for tool in tools:
        known = list(properties(tool))
        if len(known) != 1:
            raise ConfigError(
                f"tool {tool.name!r} takes {len(known)} arguments {known}, and a call in the format "
                f"{tool_format.value!r} holds exactly one; use tool_format={ToolFormat.HERMES.value!r}"
            )
        arguments[tool.name] = known[0]
    return arguments


def command_tool(tools: Sequence[ToolSpec], tool_format: ToolFormat) -> str:
    """The tool that runs commands: its only argument is called command, or it is called after a shell.

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


def _call(tools: Sequence[ToolSpec], name: str, text: str) -> ToolCall:
    known: Mapping[str, Any] = next(properties(tool) for tool in tools if tool.name == name)
    return ToolCall(name, {argument: value_of(text, schema) for argument, schema in known.items()})


def _only(call: ToolCall) -> str:
    (value,) = call.arguments.values()
    return text_of(value)


@dataclass(frozen=True, slots=True)
class TagsSyntax:
    """``<bash>ls</bash>``. Where the tags are tokens, only those count; else no argument can hold a tool's tag."""

    tools: Sequence[ToolSpec]
    are_tokens: bool = False
    in_template = False

    def __post_init__(self) -> None:
        only_arguments(self.tools, ToolFormat.TAGS)

    @property
    def _names(self) -> str:
        return "|".join(re.escape(tool.name) for tool in self.tools) or r"(?!)"

    def read(self, reply: Reply) -> Reading:
        return walk(reply, re.compile(f"<({self._names})>"), self._read_one, shape(self, self.tools))

    def _read_one(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        opening, closing = match[0], f"</{match[1]}>"
        for tag in re.compile(f"</?({self._names})>").finditer(reply.text, match.end()):
            if reply.marks is not None and tag.start() not in reply.marks:
                continue
            if tag[0] == closing:
                return _call(self.tools, match[1], reply.text[match.end() : tag.start()]), tag.end()
            raise Unreadable(f"{opening} is followed by {tag[0]}; close it with {closing}")
        raise Unreadable(unfinished(opening, closing, reply.stopped))

    def write(self, call: ToolCall) -> list[str]:
        return [Mark(f"<{call.tool}>"), _only(call), Mark(f"</{call.tool}>")]

    def instructions(self, calls: str) -> str:
        return _one_by_one(self, self.tools, calls)

    def taught_by(self, template: str) -> bool:
        return self.are_tokens  # who has tokens for them was trained on them


@dataclass(frozen=True, slots=True)
class BashBlockSyntax:
    """A fenced block whose language names the tool; ``bash``, ``sh`` and ``shell`` all name the one for commands.

    As in Markdown a fence may be longer than three, and a shorter one is text inside it, so a block can hold any text.
    Prose before a block is part of the format; prose after the last one is not.
    """

    tools: Sequence[ToolSpec]
    in_template = False
    are_tokens = False

    def __post_init__(self) -> None:
        command_tool(self.tools, ToolFormat.BASH_BLOCK)

    @property
    def _by_language(self) -> dict[str, str]:
        shells = dict.fromkeys(SHELLS, command_tool(self.tools, ToolFormat.BASH_BLOCK))
        return shells | {tool.name: tool.name for tool in self.tools}

    def read(self, reply: Reply) -> Reading:
        languages = "|".join(map(re.escape, self._by_language))
        opening = re.compile(rf"^[ ]{{0,3}}(`{{3,}})[ \t]*({languages})[ \t\r]*$", re.MULTILINE)
        return walk(reply, opening, self._read_one, shape(self, self.tools), prose=True)

    def _read_one(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        fence, language, start = match[1], match[2], match.end() + 1
        closing = re.compile(rf"^[ ]{{0,3}}`{{{len(fence)},}}[ \t\r]*$", re.MULTILINE).search(reply.text, start)
        if closing is None:
            raise Unreadable(unfinished(fence + language, fence, reply.stopped))
        body = reply.text[start : max(start, closing.start() - 1)]
        return _call(self.tools, self._by_language[language], body), closing.end()

    def write(self, call: ToolCall) -> list[str]:
        text = _only(call)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return [f"{fence}{call.tool}\n{text}\n{fence}"]

    def instructions(self, calls: str) -> str:
        return _one_by_one(self, self.tools, calls)

    def taught_by(self, template: str) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class PlainSyntax:
    """The whole reply is a command; a reply whose first word is another tool is a call of that one.

    ``submit 42`` calls submit. No reply holds two calls, or a command that begins with another tool's name.
    """

    tools: Sequence[ToolSpec]
    in_template = False
    are_tokens = False

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
                raise Unreadable(no_call(reply, self._shapes()))
            reading.calls.append(self._read_one(text))
        except Unreadable as problem:
            reading.problem = str(problem)
        return reading

    def _read_one(self, text: str) -> ToolCall:
        for tool in self._others:
            match = re.match(rf"{re.escape(tool.name)}(?:\s(.*))?\Z", text, re.DOTALL)
            if match:
                return _call(self.tools, tool.name, match[1] or "")
        return _call(self.tools, self._command, text)

    def write(self, call: ToolCall) -> list[str]:
        return [_only(call) if call.tool == self._command else f"{call.tool} {_only(call)}"]

    def instructions(self, calls: str) -> str:
        others = "".join(
            f"\nReply {shape(self, self.tools, tool.name)} to call {tool.name}: {tool.description}"
            for tool in self._others
        )
        return f"Reply with one shell command and nothing else: the whole reply is run.{others}"

    def _shapes(self) -> str:
        return " or ".join(["a command", *(shape(self, self.tools, tool.name) for tool in self._others)])

    def taught_by(self, template: str) -> bool:
        return False


def _one_by_one(syntax: TagsSyntax | BashBlockSyntax, tools: Sequence[ToolSpec], calls: str) -> str:
    lines = "\n".join(f"{shape(syntax, tools, tool.name)}\n{tool.description}" for tool in tools)
    return f"You can call these tools, {calls} in each reply:\n{lines}"
