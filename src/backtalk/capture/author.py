"""Who decides what an agent does in a captured episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from backtalk.errors import SamplerError
from backtalk.messages import Message, ToolCall, ToolSpec
from backtalk.rollout.sampler import Completion


class Left(SamplerError):
    """The author went away in the middle: the episode ends there, without a reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an author is shown before a reply: the tools, what was said since the last one, and the whole as tokens."""

    tools: tuple[ToolSpec, ...]
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One action: text, and a call after it. ``sampled`` holds the ids instead, where a model sampled them from just
    the tokens it was shown and its logprobs are known; only such an action can be trained as one.
    """

    text: str = ""
    call: ToolCall | None = None
    sampled: Completion | None = None
    cut: bool = False  # the text ended at a limit, not by itself


class Author(Protocol):
    """Plays one episode; a new one needs a new author."""

    async def reply(self, seen: Seen) -> Reply:
        """The next action.

        Raises:
            Left: there is none, because the author has gone.
            SamplerError: the author cannot be reached. It costs the episode.
        """
        ...


def text_of(messages: Sequence[Message]) -> str:
    """What several messages say."""
    return "\n".join(message.text for message in messages)
