"""Find in a recorded terminal what the world did not say: the shell's prompts, and the commands that it echoes.

A terminal repeats what is typed. It breaks a long line at its width and drops a space that the break falls on. What is
typed while a program runs shows at once, without a prompt, and again when the shell reads it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

Span = tuple[int, int]

# user@host:path$ or [user@host path]$, perhaps after the name of a Python environment; bash-5.2$
_HOST = r"(?:\([^()\n]{1,40}\) )?\[?[\w.-]+@[\w.-]+[: ][^\n]{0,200}?[#$%]"
_SHELL = rf"(?:{_HOST}|(?:ba|da|k|z)?sh-[\d.]+[#$%])"
_ANY = rf"(?:{_SHELL}|[\w-]*[#$%>]|>>>|\.\.\.)"  # any other one counts only before a command that it is known to echo
_BEFORE_COMMAND = re.compile(rf"{_ANY} \Z")
_ALONE = re.compile(rf"{_SHELL} ?\Z")
_FIRST = re.compile(rf"{_HOST} ")
_END = re.compile(r"(?:[#$%>]|\.\.\.) ")
_USER = re.compile(r"^(?:\([^()\n]{1,40}\) )?\[?([\w.-]+)@[\w.-]+[: ]", re.MULTILINE)
_KEY = re.compile(r"C-([a-z])\Z")  # control and a letter, as harnesses write it


def harness_spans(text: str, commands: Sequence[str], earlier: Sequence[str] = ()) -> list[Span]:
    """Return the spans of ``text`` that are prompts and echoes.

    ``commands`` are what was typed before it, in order, and ``earlier`` what was typed in turns before that, which a
    screen may still show.
    """
    typed, old = _lines(commands), list(dict.fromkeys(_lines(earlier)))
    users = {match[1] for match in _USER.finditer(text)}
    spans: list[Span] = []
    prompts: set[str] = set()
    hosts: set[str] = set()
    end, known = 0, 0  # where the last echo ends, and how many lines are behind it
    for row in re.finditer(r"[^\n]+", text):
        start, stop = row.span()
        if start < end:
            continue
        follows = end in (0, start)  # what begins with > elsewhere may be a diff's
        found = _echo(text, start, stop, typed, known)
        if found is None and (follows or not text.startswith(("> ", "... "), start)):
            found = _echo(text, start, stop, old, 0, is_old=True)
        if found is None:
            alone = _alone(text, start, stop, users, prompts if follows else prompts - {">", "..."}, hosts)
            end = alone[0][1] if alone and follows else end
            spans += alone
            continue
        begin, upto, number = found
        if number is not None:
            spans += _typed_ahead(text, end, start, typed[number:]) if known else ()
            spans += _without_prompt(text, end, start, typed[known:number])
            known = number + 1
        match = _BEFORE_COMMAND.search(text[start:begin])  # output without a line's end may stand before the prompt
        prompt = begin if match is None else _without_output(text, start + match.start(), users)
        prompts.add(text[prompt:begin].rstrip())
        hosts.update(match[0] for match in _USER.finditer(text[prompt:begin]))
        spans.append((prompt, upto))
        end = upto
    return [*spans, *_without_prompt(text, end, len(text), typed[known:])]


def _lines(commands: Sequence[str]) -> list[str]:
    return [line for command in commands for line in map(str.rstrip, command.split("\n")) if line]


def _echo(
    text: str, start: int, stop: int, typed: Sequence[str], known: int, is_old: bool = False
) -> tuple[int, int, int | None] | None:
    """Return where a row's echo begins and ends and which line it is, of those from ``known`` on; None without one."""
    for match in _END.finditer(text, start, stop):
        for number in range(known, len(typed)):
            if (upto := _end_of_echo(text, match.end(), typed[number])) is not None:
                return match.end(), upto, None if is_old else number
    for number in range(known, 0 if is_old else len(typed)):
        key = _KEY.match(typed[number])
        if key is not None and text.endswith(f"^{key[1].upper()}", start, stop):
            return stop - 2, min(stop + 1, len(text)), number
    return None


def _end_of_echo(text: str, at: int, line: str) -> int | None:
    """Return where the echo of a line ends, the line's end included; None where something else stands there."""
    begin = at
    for count, letter in enumerate(line):
        if at > begin and text.startswith("\n", at):
            if letter == " " and not text.startswith("\n ", at):
                continue
            at += 1
        if letter == "\t":  # shown as spaces, or taken for completion and not shown
            while text.startswith((" ", "\t"), at):
                at += 1
        elif text.startswith(letter, at):
            at += 1
        else:  # a screen that was taken while the line was typed ends in the middle of it
            return at if at == len(text) and count > 2 else None
    if at == len(text):
        return at
    return at + 1 if text.startswith("\n", at) else None


def _without_output(text: str, start: int, users: set[str]) -> int:
    """Return where a prompt begins whose user's name runs on from output, as in ``doneroot@host:~#``."""
    match = _USER.match(text[start:])
    name = "" if match is None else match[1]
    shorter = [user for user in users if user != name and name.endswith(user)]
    return start + len(name) - len(max(shorter, key=len)) if shorter else start


def _alone(text: str, start: int, stop: int, users: set[str], prompts: set[str], hosts: set[str]) -> list[Span]:
    """Return the prompt of a row without an echo: alone on it, at a screen's end, or with output after it."""
    row, end = text[start:stop], min(stop + 1, len(text))
    if row.rstrip() in prompts:
        return [(start, end)]
    match = _ALONE.search(row)
    if match is not None and (match.start() == 0 or not text[stop:].strip()):
        return [(_without_output(text, start + match.start(), users), end)]
    match = _FIRST.match(row)
    is_known = match is not None and any(row.startswith(host) for host in hosts)
    return [(start, start + match.end())] if match is not None and is_known else []


def _without_prompt(text: str, begin: int, stop: int, typed: Sequence[str]) -> list[Span]:
    """Return rows that are exactly lines that no prompt came before: a program ran, or had written over the prompt."""
    spans: list[Span] = []
    number, end = 0, begin
    for row in re.finditer(r"[^\n]+", text[begin:stop]):
        start = begin + row.start()
        for line in range(number, len(typed)) if start >= end else ():
            if (upto := _end_of_echo(text, start, typed[line])) is not None and upto <= stop:
                spans.append((start, upto))
                number, end = line + 1, upto
                break
    return spans


def _typed_ahead(text: str, begin: int, stop: int, typed: Sequence[str]) -> list[Span]:
    """Return the spans typed ahead: without prompts right behind an echo, and echoed again from ``stop`` on, by line.

    ``typed`` are the lines from that of ``stop`` on. A program may well print one of them, so a single row counts only
    if it is the first; several rows are several lines in order, of which the first may have lost its beginning.
    """
    rows = list(re.finditer(r"[^\n]*\n|[^\n]+\Z", text[begin:stop]))
    while rows and rows[-1][0].strip() in ("", ">"):  # a here-document's empty lines
        rows.pop()
    gap = [(begin + (rows[-1].end() if rows else 0), stop)]
    squeezed = ["".join(line.split()) for line in typed]
    ends = {0, *accumulate(map(len, squeezed))}
    whole = "".join(squeezed)
    for count in range(len(rows), 0, -1):
        said = "".join("".join(row[0] for row in rows[:count]).split())
        at = whole.find(said)
        while said and at >= 0:
            lines = sum(at < end <= at + len(said) for end in ends)
            alone = at == 0 if lines == 1 else at in ends or count == len(rows)
            if at + len(said) in ends and alone:
                return [(begin, begin + rows[count - 1].end()), *gap]
            at = whole.find(said, at + 1)
    return gap if not rows else []
