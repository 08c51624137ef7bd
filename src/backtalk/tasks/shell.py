"""Read shell scripts: their lines with what continues them, and the commands of a line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from backtalk.sandboxes.images.shellwords import unquoted

_BEFORE = re.compile(
    r"(?:(?:if|then|elif|else|do|while|until|!|\{|time|exec|sudo(?:\s+-\S+)*|env|timeout\s+\S+"
    r"|\w+=(?:[^\s\"'(`]|\"[^\"]*\"|'[^']*')*)\s+)*"
)
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_]\w*)\1")


def command_spans(line: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each command of a line, without words before it such as ``if`` and ``sudo``.

    Commands end at ``;``, ``&&``, ``||`` and brackets; a pipeline is one command. ``$(...)`` within double quotes
    belongs to the command around it.
    """
    edges, last = [], -1
    for at in unquoted(line):
        if line[at] == "#" and (at == 0 or line[at - 1].isspace()):
            edges.append((at, len(line)))
            break
        if at <= last:
            continue
        if line[at] in ";()":
            edges.append((at, at + 1))
        elif line.startswith(("&&", "||"), at):
            edges.append((at, at + 2))
            last = at + 1
    begins = [0, *(end for _, end in edges)]
    for begin, end in zip(begins, [*(at for at, _ in edges), len(line)], strict=True):
        end = begin + len(line[begin:end].rstrip())
        begin = end - len(line[begin:end].lstrip())
        begin += len(_BEFORE.match(line[begin:end]).group())  # type: ignore[union-attr]  # it matches anything
        if begin < end:
            yield begin, end


def logical_lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (number, line with its continuation lines, whether it is code, not a comment or a heredoc's body)."""
    physical = text.splitlines(keepends=True)
    at = 0
    while at < len(physical):
        start, line = at, physical[at]
        at += 1
        is_code = not line.lstrip().startswith("#")
        while is_code and line.rstrip("\n").endswith("\\") and at < len(physical):
            line += physical[at]
            at += 1
        yield start + 1, line, is_code
        open_places = set(unquoted(line)) if is_code else set()
        for mark in _HEREDOC.finditer(line):
            while mark.start() in open_places and line[mark.start() - 1 : mark.start()] != "<" and at < len(physical):
                at += 1
                yield at, physical[at - 1], False
                if physical[at - 1].strip() == mark.group(2):
                    break
