"""Chat messages, tools and tool calls, as text: what a policy and its environment exchange before it becomes tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backtalk.trajectory import TokenRole


def clean_text(text: str) -> str:
    """Return the text with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message's text and the role of its tokens."""

    text: str
    role: TokenRole


def truncate_text(
    text: str,
    max_chars: int,
    role: TokenRole,
    keep: Literal["both", "head", "tail"] = "both",
    *,
    dropped_bytes: int = 0,
    dropped_at: int = 0,
) -> list[Part]:
    """Return a text as parts of ``role``, none if it is empty; cut it if longer than ``max_chars`` characters.

    ``keep`` says which characters stay: half from each end, or all from the head or the tail. A WARNING part in the
    place of the others says how many are left out, and so where ``dropped_bytes`` are missing already, before character
    ``dropped_at``.
    """
    cuts = [(dropped_at, dropped_at, f"{dropped_bytes} bytes")] if dropped_bytes else []
    if (excess := len(text) - max_chars) > 0:
        start = {"both": max_chars // 2, "head": max_chars, "tail": 0}[keep]
        what = f"{excess} characters"
        if cuts and start <= dropped_at <= start + excess:
            what = f"{what} and {cuts.pop()[2]}"
        cuts.append((start, start + excess, what))
    parts, position = [], 0
    for start, end, what in sorted(cuts):
        own_line = "\n" if start > position and text[start - 1] != "\n" else ""
        place = " at the end" if end == len(text) else "" if start else " at the beginning"
        notice = Part(f"{own_line}[{what} left out{place}]\n", TokenRole.WARNING)
        parts += [Part(text[position:start], role), notice]
        position = end
    return [part for part in (*parts, Part(text[position:], role)) if part.text]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message of a system, a user or a tool; its parts carry the token roles."""

    role: str  # chat role: "system" | "user" | "tool"
    parts: tuple[Part, ...]
    tool: str | None = None  # name of the tool that answers

    @property
    def text(self) -> str:
        """Return the text of all parts."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that the policy may call; ``parameters`` is a JSON Schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash((self.name, self.description))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call; the arguments are JSON values."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """An action read as tool calls to run in order, or as an error.

    ``error`` is set exactly when ``calls`` is empty; it becomes the observation, as WARNING. ``warnings`` are faults of
    form that left the calls readable. ``notice`` is put before the observation, also as WARNING: it names calls that
    are not run, and with ``format_warnings`` the faults of form too.
    """

    text: str
    calls: tuple[ToolCall, ...]
    error: str | None = None
    warnings: tuple[str, ...] = ()
    notice: str = ""

    def __post_init__(self) -> None:
        if (self.error is None) != bool(self.calls):
            raise ValueError(f"an action has calls or an error, got {len(self.calls)} calls and error={self.error!r}")
