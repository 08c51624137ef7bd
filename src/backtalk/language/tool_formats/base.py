"""What every format shares: what a reply is, how it is walked through, what was found in it."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from backtalk.messages import ToolCall, ToolSpec


class ToolFormat(StrEnum):
    """The way a policy writes a call."""

    TAGS = "tags"  # <bash>ls -la</bash>: the tag names the tool, the body is its one argument
    HERMES = "hermes"  # <tool_call>\n{"name": "bash", "arguments": {"command": "ls -la"}}\n</tool_call>
    QWEN3_CODER = "qwen3_coder"  # <tool_call>\n<function=bash>\n<parameter=command>\nls -la\n</parameter>...
    LLAMA3_JSON = "llama3_json"  # {"name": "bash", "parameters": {"command": "ls -la"}}
    BASH_BLOCK = "bash_block"  # ```bash\nls -la\n```: the block's language names the tool
    PLAIN = "plain"  # ls -la: the whole reply is a command


CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Mark(str):
    """Markup in a written call: control tokens are looked for in it, as they are not in the text beside it."""

    __slots__ = ()


class Unreadable(Exception):
    """A call that cannot be read; the message is for the policy. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a policy wrote in one turn, without the token that ended it.

    ``stopped`` is False where the token limit cut it. ``opened`` says that the chat template had opened ``<think>``
    for it. ``marks`` are the positions of the format's own tokens; None where marks that are spelled out count too.
    """

    text: str
    stopped: bool = True
    opened: bool = False
    marks: frozenset[int] | None = None


@dataclass(slots=True)
class Reading:
    """What a reply holds: calls in order up to the first that cannot be read, and why that one cannot."""

    calls: list[ToolCall] = field(default_factory=list)
    problem: str | None = None  # set where there is no call
    warnings: list[str] = field(default_factory=list)
    thought: bool = False  # it holds thinking

    def warn(self, warning: str) -> None:
        """Once each."""
        if warning not in self.warnings:
            self.warnings.append(warning)


class Syntax(Protocol):
    """One format for one set of tools."""

    @property
    def in_template(self) -> bool:
        """Whether chat templates may teach it, given the tools."""
        ...

    @property
    def are_tokens(self) -> bool:
        """Whether its marks count only as tokens of their own, so that spelled out they are text."""
        ...

    def read(self, reply: Reply) -> Reading:
        """Never raises, whatever the text."""
        ...

    def write(self, call: ToolCall) -> list[str]:
        """Markup (``Mark``) and text in turns. What comes out wrong is found by reading it again."""
        ...

    def instructions(self, calls: str) -> str:
        """What a policy is told where the chat template does not; ``calls`` is how many a reply may hold, in words."""
        ...

    def taught_by(self, template: str) -> bool:
        """Whether a rendered prompt explains this format."""
        ...


def unfinished(opening: str, closing: str, stopped: bool) -> str:
    return f"{opening} was not closed with {closing}" if stopped else f"cut at the token limit before {closing}"


def no_call(reply: Reply, shape: str) -> str:
    return f"{'no tool call' if reply.stopped else 'cut at the token limit before a tool call'}; write {shape}"


def excerpt(text: str, position: int = 0, width: int = 24) -> str:
    """A little of what was got, in quotes."""
    return repr(text[position : position + width]) + ("..." if len(text) > position + width else "")


ReadOne = Callable[[Reply, re.Match[str], Reading], tuple[ToolCall, int]]


def walk(
    reply: Reply, opening: re.Pattern[str], read_one: ReadOne, shape: str, *, between: str = "", prose: bool = False
) -> Reading:
    """Calls in the order they stand, up to the first that cannot be read; a call inside thinking is no call.

    ``read_one`` gets the match of ``opening``, and gives the call and where it ends, or raises Unreadable.
    ``between`` are characters that may stand between calls; ``prose`` says that text before a call is no fault.
    """
    reading = Reading()
    position = 0
    try:
        if reply.opened:
            position = _skip_thinking(reply, 0, reading)
        for match in _openings(reply, opening):
            if match.start() < position:
                continue
            _outside(reply.text[position : match.start()], reading, between, prose)
            if match[0] == THINK_OPEN:
                position = _skip_thinking(reply, match.end(), reading)
            else:
                call, position = read_one(reply, match, reading)
                reading.calls.append(call)
        _outside(reply.text[position:], reading, between)
        if not reading.calls:
            raise Unreadable(no_call(reply, shape))
    except Unreadable as problem:
        reading.problem = str(problem)
    return reading


def skip_leading_thinking(reply: Reply, reading: Reading) -> int:
    """Where the answer begins in a format that has no marks. Raises Unreadable where thinking does not end."""
    start = 0 if reply.opened else len(reply.text) - len(reply.text.lstrip())
    if not reply.opened:
        if not reply.text.startswith(THINK_OPEN, start):
            return 0
        start += len(THINK_OPEN)
    end = _skip_thinking(reply, start, reading)
    for _ in range(2):  # the blank line that follows thinking
        end += reply.text.startswith("\n", end)
    return end


def _openings(reply: Reply, opening: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Openings of calls and of thinking, in order."""
    thinking = re.compile(re.escape(THINK_OPEN))
    calls = (m for m in opening.finditer(reply.text) if reply.marks is None or m.start() in reply.marks)
    yield from sorted((*calls, *thinking.finditer(reply.text)), key=lambda match: match.start())


def _skip_thinking(reply: Reply, start: int, reading: Reading) -> int:
    """Where thinking that was opened before ``start`` ends."""
    end = reply.text.find(THINK_CLOSE, start)
    if end < 0:
        if reading.calls:  # they stand; nothing more was meant to be one
            reading.warn(f"{THINK_OPEN} was not closed with {THINK_CLOSE}")
            reading.thought = True
            return len(reply.text)
        raise Unreadable(unfinished(THINK_OPEN, THINK_CLOSE, reply.stopped))
    if reading.thought:
        reading.warn(f"more than one {THINK_OPEN}...{THINK_CLOSE}")
    if THINK_OPEN in reply.text[start:end]:
        reading.warn(f"{THINK_OPEN} inside {THINK_OPEN}")
    reading.thought = True
    return end + len(THINK_CLOSE)


def _outside(text: str, reading: Reading, between: str, prose: bool = False) -> None:
    if THINK_CLOSE in text:
        reading.warn(f"{THINK_CLOSE} without {THINK_OPEN}")
        text = text.replace(THINK_CLOSE, "")
    if not prose and text.strip(between + string.whitespace):
        reading.warn("text outside the call")


def names(tools: Sequence[ToolSpec]) -> str:
    """bash, look and submit."""
    listed = [tool.name for tool in tools]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
