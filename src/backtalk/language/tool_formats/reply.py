"""Decide which calls of a reply are run and what the policy is told, and write replies from calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from backtalk.errors import RenderError
from backtalk.language.tool_formats.base import THINK_CLOSE, THINK_OPEN, Mark, Reply, Syntax
from backtalk.language.tool_formats.values import call_problem, clean_value
from backtalk.messages import ParsedAction, ToolCall, ToolSpec, clean_text


def parse_reply(
    syntax: Syntax,
    tools: Sequence[ToolSpec],
    reply: Reply,
    *,
    max_calls: int = 1,
    which: Literal["first", "last"] = "first",
    thinking: bool = False,
    report_warnings: bool = False,
) -> ParsedAction:
    """Return the calls of a reply to run, at most ``max_calls`` of its first or last, and messages to the policy.

    A call that cannot be read or does not fit its tool ends the list, as later calls may depend on it. So with "last"
    none is run if one cannot be read. ``thinking`` says that a reply has to think first; ``report_warnings``, that the
    policy is told of faults of form.
    """
    reading = syntax.read(reply)
    problem, skipped = reading.problem, 0
    if which == "last":
        skipped = len(reading.calls) if problem else max(0, len(reading.calls) - max_calls)
    calls = reading.calls[skipped:]
    for number, call in enumerate(calls[:max_calls]):
        wrong = call_problem(call, tools)
        if wrong:
            problem, calls = f"{wrong}; write {syntax.example(call.tool)}", calls[:number]
            break
    if thinking and not reading.has_thinking and calls:
        reading.warn(f"no {THINK_OPEN}...{THINK_CLOSE} before the call")
    always: list[str] = []
    if skipped:
        last = "the last call was" if max_calls == 1 else f"the last {max_calls} calls were"
        always.append(f"only {last} run; write {call_limit(max_calls)} in each reply")
    if len(calls) > max_calls or (calls and problem and len(calls) == max_calls):
        first = "the first call was" if max_calls == 1 else f"the first {max_calls} calls were"
        always.append(f"only {first} run; write {call_limit(max_calls)} in each reply")
    elif calls and problem:
        always.append(f"what follows call {skipped + len(calls)} was not run: {problem}")
    if not calls:
        return ParsedAction(reply.text, (), f"[{problem}]")
    warnings = [*always, *reading.warnings]
    notice = "".join(f"[{warning}]\n" for warning in (warnings if report_warnings else always))
    return ParsedAction(reply.text, tuple(calls[:max_calls]), None, tuple(warnings), notice)


def call_limit(max_calls: int) -> str:
    """Return the number of calls that a reply may have, in words."""
    return "one call" if max_calls == 1 else f"at most {max_calls} calls"


def write_reply(
    syntax: Syntax, call: ToolCall, text: str = "", *, opened: bool = False, thinking: bool = False
) -> list[str]:
    """Return a reply of some text and a call, as markup and text. If thinking is on, the text is the thinking.

    Raises:
        RenderError: the format cannot hold this call: another one would be read back.
    """
    before: list[str] = [text + "\n"] if text else []
    if (opened or thinking) and THINK_CLOSE not in text:
        opening = [] if opened else [Mark(THINK_OPEN), "\n"]
        before = [*opening, f"{text}\n", Mark(THINK_CLOSE), "\n\n"]
    problem = "what is read back is another call"
    try:
        pieces = [*before, *syntax.write(call)]
        wanted = clean_value({call.tool: dict(call.arguments)})
        reading = syntax.read(Reply("".join(clean_value(pieces)), opened=opened, marks=_marks(syntax, pieces)))
        if [{read.tool: dict(read.arguments)} for read in reading.calls] == [wanted] and not reading.problem:
            return pieces
        problem = reading.problem or problem
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise RenderError(
        f"a call of {call.tool} with the arguments {str(dict(call.arguments))[:200]} cannot be written in this format: "
        f"{problem}; the strings of tool_format='hermes' hold any text"
    )


def write_message(
    syntax: Syntax, text: str, calls: Sequence[ToolCall], reasoning: str, *, marks: Iterable[str], opened: bool
) -> list[str]:
    """Return an assistant's message from another source as markup and text.

    Each of ``marks`` in the text is markup. A call that the format cannot hold is written as text. ``reasoning`` is put
    before the text in think tags; ``opened`` says that the generation prompt has opened them.
    """
    pieces: list[str] = []
    if (opened or reasoning) and THINK_CLOSE not in text:
        pieces += [*([] if opened else [Mark(THINK_OPEN)]), f"\n{reasoning}\n", Mark(THINK_CLOSE), "\n\n"]
    known = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    pieces += [Mark(piece) if n % 2 else piece for n, piece in enumerate(re.split(f"({known})", text))]
    for number, call in enumerate(calls):
        pieces += ["\n"] if number or text else []
        try:
            pieces += write_reply(syntax, call)
        except RenderError:
            pieces.append(call_text(call.tool, call.arguments))
    return pieces


def call_text(tool: Any, arguments: Any) -> str:
    """Return a call that cannot be read, or that a format cannot hold, as text: the tool and its arguments."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return clean_text(f"{tool} {written}".strip())


def _marks(syntax: Syntax, pieces: Sequence[str]) -> frozenset[int] | None:
    """Return the positions of the markup, for a format whose marks count only as tokens; None for others."""
    if not syntax.marks_are_tokens:
        return None
    starts, position = set(), 0
    for piece in pieces:
        if isinstance(piece, Mark):
            starts.add(position)
        position += len(clean_value(str(piece)))
    return frozenset(starts)
