"""Shared parts of all tool formats: a reply, what was read in it, and the loop that reads calls one after another."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from backtalk.language.tool_formats.values import example_call
from backtalk.messages import ToolCall, ToolSpec

_SOME_TOOL = ToolSpec("tool", "", {"properties": {"argument": {"type": "string"}}})


class ToolFormat(StrEnum):
    """The format in which a policy writes a tool call."""

    TAGS = "tags"  # <bash>ls -la</bash>: the tag names the tool, the body is its one argument
    HERMES = "hermes"  # <tool_call>\n{"name": "bash", "arguments": {"command": "ls -la"}}\n</tool_call>
    QWEN3_CODER = "qwen3_coder"  # <tool_call>\n<function=bash>\n<parameter=command>\nls -la\n</parameter>...
    LLAMA3_JSON = "llama3_json"  # {"name": "bash", "parameters": {"command": "ls -la"}}
    BASH_BLOCK = "bash_block"  # ```bash\nls -la\n```: the block's language names the tool
    PLAIN = "plain"  # ls -la: the whole reply is a command


CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Mark(str):
    """Markup in a written call: text in which control tokens are encoded as such."""

    __slots__ = ()


class Unreadable(Exception):
    """A call that cannot be read; the message is for the policy. It is not raised outside this package.

    ``at`` is the position in the reply from which on no text could make it readable, None if more text might.
    """

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.at = at


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of one action, without its stop token.

    ``stopped`` is False if the token limit cut it. ``opened`` says that the generation prompt had opened ``<think>``.
    ``marks`` are the character positions of the format's own tokens; None if marks written as plain text count too.
    """

    text: str
    stopped: bool = True
    opened: bool = False
    marks: frozenset[int] | None = None


@dataclass(slots=True)
class Reading:
    """The calls of a reply, up to the first that cannot be read, and the problem with that one."""

    calls: list[ToolCall] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # positions at which each call begins and ends
    broken: tuple[int, int] | None = None  # where a call begins that no text could make readable, and from where on
    problem: str | None = None  # set if there is no call
    warnings: list[str] = field(default_factory=list)
    has_thinking: bool = False  # the reply has thinking in it

    def warn(self, warning: str) -> None:
        """Add a warning, unless it is there already."""
        if warning not in self.warnings:
            self.warnings.append(warning)


@dataclass(frozen=True)
class Syntax(ABC):
    """A tool format for one set of tools."""

    tools: Sequence[ToolSpec]
    in_chat_templates: ClassVar[bool] = False  # whether chat templates that get the tools may explain this format
    between: ClassVar[str] = ""  # characters allowed between calls
    # Whether only control tokens count as its marks, so that the same characters are plain text.
    marks_are_tokens = False
    has_prose = False  # whether prose before a call is part of the format

    @property
    def openings(self) -> tuple[str, ...]:
        """Return the marks that can begin a call."""
        return ()

    @property
    def closings(self) -> tuple[str, ...]:
        """Return the marks that can end a call; none if the format has no closing mark."""
        return ()

    def __post_init__(self) -> None:  # noqa: B027 (most formats hold any tool)
        """Check that the tools fit the format; a ConfigError says what does not."""

    @abstractmethod
    def write(self, call: ToolCall) -> list[str]:
        """Return a call as markup (``Mark``) and text, without checking that it can be read back."""

    def instructions(self, calls: str) -> str:
        """Return instructions for a policy whose chat template has none; ``calls`` is the limit, such as "one call"."""
        lines = "\n".join(f"{self.example(tool.name)}\n{tool.description}" for tool in self.tools)
        return f"You can call these tools, {calls} in each reply:\n{lines}"

    def is_explained_in(self, template: str) -> bool:
        """Return whether a rendered prompt explains this format."""
        return False

    def example(self, name: str | None = None) -> str:
        """Return an example call of the tool with this name, or of the first tool."""
        first = self.tools[0] if self.tools else _SOME_TOOL
        return "".join(self.write(example_call(next((tool for tool in self.tools if tool.name == name), first))))

    def _opening(self) -> re.Pattern[str]:
        """Return the pattern of what opens a call."""
        raise NotImplementedError

    def _read_call(self, reply: Reply, match: re.Match[str], reading: Reading) -> tuple[ToolCall, int]:
        """Return the call that a match opens, and its end position; raise Unreadable if it cannot be read."""
        raise NotImplementedError

    def read(self, reply: Reply) -> Reading:
        """Read the calls of a reply in order, up to the first that cannot be read; those inside thinking do not count.

        This raises nothing, whatever the text.
        """
        reading = Reading()
        start = position = 0
        calls = (m for m in self._opening().finditer(reply.text) if reply.marks is None or m.start() in reply.marks)
        thinking = re.finditer(re.escape(THINK_OPEN), reply.text)
        try:
            if reply.opened:
                position = _skip_thinking(reply, 0, reading)
            for match in sorted((*calls, *thinking), key=lambda match: match.start()):
                if match.start() < position:
                    continue
                start = match.start()
                _check_outside(reply.text[position:start], reading, self.between, self.has_prose)
                if match[0] == THINK_OPEN:
                    position = _skip_thinking(reply, match.end(), reading)
                else:
                    call, position = self._read_call(reply, match, reading)
                    reading.calls.append(call)
                    reading.spans.append((start, position))
            _check_outside(reply.text[position:], reading, self.between)
            if not reading.calls:
                raise Unreadable(no_call_problem(reply, self.example()))
        except Unreadable as problem:
            reading.problem = str(problem)
            reading.broken = None if problem.at is None else (start, problem.at)
        return reading


def unclosed(opening: str, closing: str, stopped: bool) -> str:
    """Return the message for a mark without its closing mark."""
    return f"{opening} was not closed with {closing}" if stopped else f"cut at the token limit before {closing}"


def no_call_problem(reply: Reply, example: str) -> str:
    """Return the message for a reply without a call; ``example`` is a call to write instead."""
    return f"{'no tool call' if reply.stopped else 'cut at the token limit before a tool call'}; write {example}"


def skip_leading_thinking(reply: Reply, reading: Reading) -> int:
    """Return the position after leading thinking, for a format without marks.

    Raises:
        Unreadable: the thinking is not closed.
    """
    start = 0 if reply.opened else len(reply.text) - len(reply.text.lstrip())
    if not reply.opened:
        if not reply.text.startswith(THINK_OPEN, start):
            return 0
        start += len(THINK_OPEN)
    end = _skip_thinking(reply, start, reading)
    for _ in range(2):  # the blank line that follows thinking
        end += reply.text.startswith("\n", end)
    return end


def _skip_thinking(reply: Reply, start: int, reading: Reading) -> int:
    """Return the position after the thinking that was opened before ``start``."""
    end = reply.text.find(THINK_CLOSE, start)
    if end < 0:
        if reading.calls:  # these are kept; what follows is not read
            reading.warn(f"{THINK_OPEN} was not closed with {THINK_CLOSE}")
            reading.has_thinking = True
            return len(reply.text)
        raise Unreadable(unclosed(THINK_OPEN, THINK_CLOSE, reply.stopped))
    if reading.has_thinking:
        reading.warn(f"more than one {THINK_OPEN}...{THINK_CLOSE}")
    if THINK_OPEN in reply.text[start:end]:
        reading.warn(f"{THINK_OPEN} inside {THINK_OPEN}")
    reading.has_thinking = True
    return end + len(THINK_CLOSE)


def _check_outside(text: str, reading: Reading, between: str, prose: bool = False) -> None:
    if THINK_CLOSE in text:
        reading.warn(f"{THINK_CLOSE} without {THINK_OPEN}")
        text = text.replace(THINK_CLOSE, "")
    if not prose and text.strip(between + string.whitespace):
        reading.warn("text outside the call")
