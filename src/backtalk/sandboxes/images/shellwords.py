"""Read text as a shell and Docker do: find quotes and the ends of commands, split words, expand variables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})")
_PIECE = re.compile(r"'[^']*'|\\.|\$\{[^}]*\}|\$\w+|\"|[^'\\$\"]+|.", flags=re.DOTALL)


def unquoted(text: str) -> Iterator[int]:
    """Yield the positions of characters that are neither quoted nor escaped."""
    quote, at = "", 0
    while at < len(text):
        char = text[at]
        if char == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            yield at
        at += 1


def split_list(command: str) -> list[tuple[str, str]]:
    """Split commands at && and ; that are neither quoted nor in brackets, into pairs (operator before, command)."""
    parts, before, begin, depth = [], "", 0, 0
    for at in unquoted(command):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(command[at], 0)
        if at >= begin and not depth and (command[at] == ";" or command.startswith("&&", at)):
            parts.append((before, command[begin:at].strip()))
            before = ";" if command[at] == ";" else "&&"
            begin = at + len(before)
    parts.append((before, command[begin:].strip()))
    return [(before, part) for before, part in parts if part]


def split_words(text: str) -> list[str]:
    """Split at unquoted white space; quotes are kept."""
    blanks = [at for at in unquoted(text) if text[at].isspace()]
    edges = zip([-1, *blanks], [*blanks, len(text)], strict=True)
    return [text[begin + 1 : end] for begin, end in edges if end > begin + 1]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Expand ``$NAME``, ``${NAME}``, ``${NAME:-otherwise}`` and ``${NAME:+instead}``; unknown names are empty."""

    def value(match: re.Match[str]) -> str:
        name, rule, other = match.group(1) or match.group(2), match.group(3), match.group(4) or ""
        known = variables.get(name, "")
        return (other if known else "") if rule == "+" else known or other

    return _VARIABLE.sub(value, text)


def read_word(text: str, variables: Mapping[str, str]) -> str:
    """Return a word as Docker reads it: without quotes, and with variables expanded except in single quotes."""
    out = ""
    for piece in _PIECE.findall(text):
        if piece[0] == "'" and len(piece) > 1:
            out += piece[1:-1]
        elif piece[0] == "\\" and len(piece) > 1:
            out += piece[1]
        elif piece != '"':
            out += expand(piece, variables)
    return out
