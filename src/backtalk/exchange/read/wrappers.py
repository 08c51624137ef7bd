"""Tell a harness's own phrases from the environment's output, in the text of recorded observations.

In our own rollouts each text is recorded with its role. In somebody else's record the two are one string, so the
harness's phrases have to be known: they are regular expressions, one tuple a harness.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from backtalk.exchange.plain import runs
from backtalk.exchange.read.echoes import harness_spans
from backtalk.messages import Part
from backtalk.trajectory import TokenRole


@dataclass(frozen=True, slots=True)
class Wrappers:
    """A harness's phrases: every match of ``patterns`` in an observation is WARNING, the rest is ENV_OUTPUT.

    ``echoes`` also takes a terminal's prompts and what it repeats of the agent's typing. Patterns are searched with
    MULTILINE and DOTALL.
    """

    patterns: tuple[str, ...] = ()
    echoes: bool = False

    def split(self, text: str, commands: Sequence[str] = (), earlier: Sequence[str] = ()) -> tuple[Part, ...]:
        """Return the text in parts; ``commands`` are what the agent had typed before it, ``earlier`` in other turns."""
        harness = bytearray(len(text))
        for pattern in self.patterns:
            for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
                harness[match.start() : match.end()] = b"\1" * (match.end() - match.start())
        for start, end in harness_spans(text, commands, earlier) if self.echoes else ():
            harness[start:end] = b"\1" * (end - start)
        return tuple(
            Part(text[start:end], TokenRole.WARNING if is_harness else TokenRole.ENV_OUTPUT)
            for is_harness, start, end in runs(harness or b"\0")
        )


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
