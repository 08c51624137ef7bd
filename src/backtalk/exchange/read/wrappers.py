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

# mini-swe-agent 2 and 1: tags or JSON around a command's output, notes on its length, and what was wrong with a reply.
MINI_SWE_AGENT = Wrappers(
    (
        r"\A(?:<exception>.*?</exception>\s*)?<returncode>-?\d*</returncode>\s*(?:<output>\n?)?",
        r"</?output_(?:head|tail)>\n?|<elided_chars>.*?</elided_chars>\n?|<warning>\n.*?</warning>\n?",
        r"</output>\s*\Z",
        r'\A\{\s*"returncode": -?\d+,\s*"output(?:_head)?": "|"(?:,\s*"(?:output_tail|exception_info)": "|\s*\}\s*\Z)',
        r'"?,\s*"elided_chars": \d+,\s*"warning": "Output too long\.',
        r"\AThe last command <command>.*?<output>\n?|</output>\s*Please try another command.*\Z",
        r"\A(?:Tool call error|Format error|Please always provide EXACTLY ONE|Your previous response reached)\b.*\Z",
    )
)

# SWE-agent 1 and 0.7: the words before an observation, its shell's state after it, and notes in place of output.
SWE_AGENT = Wrappers(
    (
        r"\A(?:OBSERVATION|Observation):\s*",
        r"\s*(?:\(Open file: [^\n]*\)\n)?(?:\(Current directory: [^\n]*\)\n)?bash-\$\s*\Z",
        r"\AYour (?:last )?command ran successfully and did not produce any output\.\s*\Z",
        r"\AYour last output did not use any tool calls!.*\Z|\AYour output was not formatted correctly\..*\Z",
        r"<NOTE>.*?</NOTE>\s*",
    )
)

_SIGNS = {
    TERMINUS: re.compile(
        r"\A(?:Previous response had |Current terminal state:|New Terminal Output:|Current Terminal Scr)"
    ),
    MINI_SWE_AGENT: re.compile(r"\A(?:<exception>.*?</exception>\s*)?<returncode>|\A\{\s*\"returncode\": ", re.DOTALL),
    SWE_AGENT: re.compile(r"\AOBSERVATION:\n|.*\nbash-\$\s*\Z", re.DOTALL),
}


def find_wrappers(texts: Sequence[str]) -> Wrappers:
    """Return the phrases of the harness that wrote the first text that any known one writes; none where none did."""
    for text in texts:
        for wrappers, sign in _SIGNS.items():
            if sign.match(text):
                return wrappers
    return NO_WRAPPERS
