"""Chat messages, tools and calls: what a policy and its environment say to each other, before it is tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backtalk.trajectory import TokenRole


def clean_text(text: str) -> str:
    """The same text with lone surrogates, which no encoding can hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a message's text with who said it."""

    text: str
    role: TokenRole


def truncate_text(
    text: str, max_chars: int, role: TokenRole, keep: Literal["both", "head", "tail"] = "both"
) -> list[Part]:
    """Return a text as parts of a role: one, or none where it is empty; of a longer one ``max_chars`` characters.

    ``keep`` says which: half of them from either end, or all from the head or the tail. A WARNING says how many are
    left out.
    """
    if len(text) <= max_chars:
        return [Part(text, role)] if text else []
    first = {"both": max_chars // 2, "head": max_chars, "tail": 0}[keep]
    head, tail = text[:first], text[len(text) - (max_chars - first) :]
    where = {"both": "", "head": " at the end", "tail": " at the beginning"}[keep]
    own_line = "\n" if head and not head.endswith("\n") else ""
    notice = Part(f"{own_line}[{len(text) - max_chars} characters left out{where}]\n", TokenRole.WARNING)
    return [part for part in (Part(head, role), notice, Part(tail, role)) if part.text]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. ``role`` is the chat role; who said each stretch is in the parts."""

    role: str  # "system" | "user" | "tool"
    parts: tuple[Part, ...]
    tool: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the policy is told about it; ``parameters`` is a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash((self.name, self.description))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; the arguments are JSON values."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a sampled action means: the calls to carry out, in order, or what was wrong with it.

    ``error`` is set exactly when ``calls`` is empty, and is then the observation, a WARNING. ``warnings`` are faults
    of form that left the calls readable. ``notice`` is what the policy is told of them in front of the observation,
    also a WARNING: always of calls that are not run, of the others where the settings say so.
    """

    text: str
    calls: tuple[ToolCall, ...]
    error: str | None = None
    warnings: tuple[str, ...] = ()
    notice: str = ""

    def __post_init__(self) -> None:
        if (self.error is None) != bool(self.calls):
            raise ValueError(f"an action has calls or an error, got {len(self.calls)} calls and error={self.error!r}")
