"""What a harness writes around what the world said, found in the text of recorded observations.

Where we run the environment ourselves, who said what is recorded as the text is made. In somebody else's record the
two are one string, so the harness's own phrases have to be known. They are regular expressions, one tuple a source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from backtalk.messages import Part
from backtalk.trajectory import TokenRole


@dataclass(frozen=True, slots=True)
class Wrappers:
    """What of an observation's text is the harness's: every match of ``patterns``, WARNING; the rest is ENV_OUTPUT.

    ``echoes`` also takes a command that a terminal repeats after its prompt, up to the end of that line: it was the
    agent's. Patterns are searched with MULTILINE and DOTALL.
    """

    patterns: tuple[str, ...] = ()
    echoes: bool = False

    def split(self, text: str, commands: Sequence[str] = ()) -> tuple[Part, ...]:
        """The same text in parts; ``commands`` are what the agent had typed before it."""
        harness = bytearray(len(text))
        for pattern in self.patterns:
            for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
                harness[match.start() : match.end()] = b"\1" * (match.end() - match.start())
        for start, end in _echoes(text, commands) if self.echoes else ():
            harness[start:end] = b"\1" * (end - start)
        parts: list[Part] = []
        start = 0
        for said, run in groupby(harness):
            end = start + len(list(run))
            parts.append(Part(text[start:end], TokenRole.WARNING if said else TokenRole.ENV_OUTPUT))
            start = end
        return tuple(parts) or (Part(text, TokenRole.ENV_OUTPUT),)


def _echoes(text: str, commands: Sequence[str]) -> list[tuple[int, int]]:
    """Where a terminal repeats lines of commands, each once, in order, right after a prompt that ends in $, # or >."""
    spans: list[tuple[int, int]] = []
    position = 0
    for command in commands:
        for line in filter(None, map(str.rstrip, command.split("\n"))):
            match = re.compile(rf"[#$>] {re.escape(line)}(?=\n|\Z)").search(text, position)
            if match is not None:
                spans.append((match.start() + 2, match.end()))
                position = match.end()
    return spans


NO_WRAPPERS = Wrappers()

# Terminus 2 of Harbor 0.25.0 and its forks; the phrases stand in the harness's source and in its trajectories.
TERMINUS = Wrappers(
    (
        # The head: what was wrong with the last reply, and what kind of screen follows.
        r"\A(?:Previous response had (?:warnings|parsing errors):\n(?:ERROR|WARNINGS): .*?(?:\n\n|\Z))?"
        r"(?:Please fix these issues and provide a proper [^\n]*\Z)?"
        r"(?:Current terminal state:\n)?(?:(?:New Terminal Output|Current Terminal Screen):\n+)?",
        r"\n*Are you sure you want to mark the task as complete\? .*\Z",
        r"\n\[\.\.\. output limited to \d+ bytes; \d+ interior bytes omitted \.\.\.\]\n",
        r"\n{2,}\Z",  # the empty rows of the pane below the last line
    ),
    echoes=True,
)
