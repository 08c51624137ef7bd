"""Limits of a rollout, and the deadline and the waits between retries that follow from them."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from backtalk.errors import ConfigError
from backtalk.settings import check_choices
from backtalk.tasks.task import Task

BACKOFF_S = 1.0  # the longest wait before the first retry; it doubles with each further one


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Limits at which a rollout ends, and the number that run concurrently."""

    max_turns: int = 16
    """Actions of one rollout."""
    max_tokens: int = 16_384
    """Tokens of a whole history: prompt, actions, observations."""
    max_tokens_per_turn: int = 2_048
    """Tokens of one action."""
    rollout_timeout_s: float = 600.0
    """Seconds from opening the environment to the last turn, retries included; scoring has as long again."""
    max_retries: int = 2
    """Further environments to try if one breaks before the policy's first action."""
    deadline: Literal["unscored", "verify", "zero"] = "unscored"
    """What a rollout whose time ran out is worth: no reward, the verifier's for what is there, or 0."""
    straggler_factor: float | None = None
    """Ends a rollout that takes this many times the median of its step; null lets each have its time."""
    concurrency: int | None = None
    """Rollouts at the same time; null is as many as this machine carries."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("max_turns", "max_tokens", "max_tokens_per_turn", "rollout_timeout_s", "concurrency"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} leaves no room for a rollout; use a number above 0")
        if self.max_retries < 0:
            raise ConfigError(f"max_retries={self.max_retries} is below 0; use 0 for no retry")
        if self.straggler_factor is not None and not self.straggler_factor >= 1:
            raise ConfigError(
                f"straggler_factor={self.straggler_factor} would end rollouts that are faster than most; use a number "
                ">= 1, for example 3, or null for none"
            )
        if self.straggler_factor is not None and self.deadline == "zero":
            raise ConfigError(
                "straggler_factor ends rollouts by the pace of others, so deadline='zero' would punish a policy for a "
                "busy machine; use deadline='unscored' or 'verify', or straggler_factor=null"
            )

    def timeout_s(self, task: Task) -> float:
        """Return the seconds of one task's rollout: the smaller of the limit here and the task's own."""
        return min(self.rollout_timeout_s, task.agent_timeout_s)


def backoff_s(key: str, retry: int) -> float:
    """Return the seconds to wait before a retry, counted from 0: doubling, less up to half by a hash of the key.

    So a run can be repeated, and rollouts whose environments broke together do not come back together.
    """
    digest = hashlib.sha256(f"{key}/{retry}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return BACKOFF_S * 2**retry * (1 - share / 2)


class Deadline:
    """Time at which a rollout ends, retries included; it can be moved while the rollout runs."""

    def __init__(self, seconds: float) -> None:
        self._begun = asyncio.get_running_loop().time()
        self._ends = self._begun + seconds
        self._scope: asyncio.Timeout | None = None

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the rollout began."""
        return asyncio.get_running_loop().time() - self._begun

    @property
    def left_s(self) -> float:
        """Return the seconds left, below 0 after the deadline."""
        return self._ends - asyncio.get_running_loop().time()

    def scope(self) -> asyncio.Timeout:
        """Return a context in which whatever is awaited is cancelled at the deadline. Enter it immediately."""
        self._scope = asyncio.timeout_at(self._ends)
        return self._scope

    def bring_forward(self, seconds: float) -> None:
        """Move the deadline to ``seconds`` after the rollout began, if that is earlier."""
        self._move(min(self._ends, self._begun + seconds))

    def postpone(self, seconds: float) -> None:
        """Move beginning and end ``seconds`` later, for time that does not count as the rollout's own."""
        self._begun += seconds
        self._move(self._ends + seconds)

    def _move(self, ends: float) -> None:
        self._ends = ends
        if self._scope is not None:
            with suppress(RuntimeError):  # the scope has been left
                self._scope.reschedule(ends)
