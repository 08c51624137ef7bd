"""Parse a Dockerfile into instructions, and the text of instructions into flags and assignments (see `plan`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from backtalk.sandboxes.images.shellwords import read_word, split_words, unquoted

HEREDOC_MARK = re.compile(r"\d*<<(-?)[ \t]*(['\"]?)([A-Za-z_][\w.]*)\2")
SCRIPT = re.compile(r"<<-?\s*(['\"]?)[A-Za-z_][\w.]*\1")  # the whole text of a RUN line whose heredoc is the script
_WAITS = re.compile(
    r"(?:(?:\S*/)?(?:tini|dumb-init)(?: -\S+)*)?(?:^| |$)(?:exec )?"
    r"(?:(?:\S*/)?(?:(?:ba|da)?sh(?: -\w+)*|sleep \w+|tail -f /dev/null))?"
)
NO_EFFECT = ("LABEL", "MAINTAINER", "EXPOSE", "CMD", "STOPSIGNAL")  # on files and commands
WHY_NOT = {
    "ENTRYPOINT": "nothing is started in a sandbox but the agent's shell; start what the agent is to find in a RUN "
    "line with '&', and in tests/test.sh what the tests are to find: every process ends before them",
    "HEALTHCHECK": "nothing watches a sandbox",
    "ONBUILD": "no image is built from this one",
}


@dataclass(frozen=True, slots=True)
class Heredoc:
    """A heredoc's body, and whether variables are expanded in it."""

    body: str
    expand: bool  # its mark was not quoted


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with its continued lines joined; ``shell`` is its text with heredocs, as a shell reads it."""

    keyword: str
    text: str
    shell: str
    heredocs: tuple[Heredoc, ...]
    line: int  # from 1


def parse_dockerfile(text: str) -> Iterator[Instruction]:
    """Yield the instructions: without comments, with continued lines joined and heredocs attached."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        start = at
        joined = ""
        while at < len(lines):
            line = lines[at].rstrip("\r")
            start = start if joined else at
            at += 1
            if line.lstrip().startswith("#") or (joined and not line.strip()):
                continue
            joined += line
            if not joined.rstrip().endswith("\\"):
                break
            joined = joined.rstrip()[:-1]
        if not joined.strip():
            continue
        keyword, *rest = joined.split(maxsplit=1)
        text = rest[0].strip() if rest else ""
        shell, heredocs = text, []
        if keyword.upper() in ("RUN", "COPY", "ADD"):
            positions = set(unquoted(shell))
            for match in HEREDOC_MARK.finditer(shell):
                is_mark = match.start() in positions and shell[match.start() - 1 : match.start()] != "<"
                if is_mark and (found := _heredoc(lines, at, match)) is not None:
                    heredoc, body, at = found
                    heredocs.append(heredoc)
                    shell += "\n" + body
        yield Instruction(keyword.upper(), text, shell, tuple(heredocs), start + 1)


def _heredoc(lines: list[str], at: int, mark: re.Match[str]) -> tuple[Heredoc, str, int] | None:
    """Return the heredoc that begins at line ``at``, its text for a shell and the next line; None if it has no end."""
    for end in range(at, len(lines)):
        line = lines[end].rstrip("\r")
        if (line.lstrip("\t") if mark.group(1) else line) == mark.group(3):
            body = [line.lstrip("\t") if mark.group(1) else line for line in lines[at:end]]
            text = "\n".join([*lines[at:end], line])
            return Heredoc("".join(line + "\n" for line in body), expand=not mark.group(2)), text, end + 1
    return None  # such as the shift in $((1 << x))


def split_flags(text: str) -> tuple[list[str], str]:
    """Split an instruction's text into its ``--flags``, without the dashes, and the rest."""
    found = []
    while match := re.match(r"--(\S+)\s+", text):
        found.append(match.group(1))
        text = text[match.end() :]
    return found, text


def is_json(text: str) -> bool:
    """Return whether a text is a JSON list, the exec form of a command."""
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def only_waits(text: str) -> bool:
    """Return whether an ENTRYPOINT only keeps a container alive: a bare shell, sleep, or tail -f /dev/null."""
    words = json.loads(text) if is_json(text) else text.split()
    return bool(_WAITS.fullmatch(" ".join(map(str, words))))


def assignments(text: str, variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """Parse the variables that ENV sets: ``A=1 B="x y"``, or the older ``A x y``.

    Raises:
        ValueError: the text is neither.
    """
    words = [word for word in split_words(text) if word]
    if not words:
        raise ValueError("a name is missing")
    if "=" not in words[0]:
        return [(words[0], read_word(text[len(words[0]) :].strip(), variables))]
    pairs = [word.partition("=") for word in words]
    if any(not sign for _, sign, _ in pairs):
        raise ValueError(f"{text!r} mixes NAME=VALUE with something else")
    return [(name, read_word(value, variables)) for name, _, value in pairs]
