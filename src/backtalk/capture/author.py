"""Define what plays a captured rollout: an ``Author`` is shown observations and replies with actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from backtalk.errors import SamplerError
from backtalk.messages import Message, ToolCall, ToolSpec
from backtalk.rollout.sampler import Completion


class Left(SamplerError):
    """The author left before the end: the rollout ends there, without a reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Input of an author: the tools, the messages since its last reply, and the whole conversation as token ids."""

    tools: tuple[ToolSpec, ...]
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One action: text, and a call after it.

    ``sampled`` holds token ids instead, where a model sampled them from exactly the tokens it was shown and their
    logprobs are known; only such an action can be trained by the policy term.
    """

    text: str = ""
    call: ToolCall | None = None
    sampled: Completion | None = None
    cut: bool = False  # the text ended at a limit, not by itself


class Author(Protocol):
    """Player of one rollout; each rollout needs a new one."""

    async def reply(self, seen: Seen) -> Reply:
        """Return the next action.

        Raises:
            Left: there is none, because the author has gone.
            SamplerError: the author cannot be reached, and the rollout fails.
        """
        ...
