"""Limits of a rollout, and the deadline that they set."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from backtalk.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Where a rollout ends at the latest, and how many run at once."""

    max_turns: int = 16
    """Actions of one rollout."""
    max_tokens: int = 16_384
    """Tokens of a whole history: prompt, actions, observations."""
    max_tokens_per_turn: int = 2_048
    """Tokens of one action."""
    rollout_timeout_s: float = 600.0
    """Seconds from opening the environment to the last turn, retries included; scoring has as long again."""
    max_retries: int = 2
    """In a fresh environment, where one broke before the policy had said anything."""
    straggler_factor: float | None = None
    """Ends what takes so many times as long as the median of a step; null lets each have its time."""
    concurrency: int | None = None
    """Rollouts at once; null is what this machine holds."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens", "max_tokens_per_turn", "rollout_timeout_s", "concurrency"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} leaves no room for an attempt; use a number above 0")
        if self.max_retries < 0:
            raise ConfigError(f"max_retries={self.max_retries} is less than one try; use 0 for no retry")
        if self.straggler_factor is not None and not self.straggler_factor >= 1:
            raise ConfigError(
                f"straggler_factor={self.straggler_factor} would end rollouts that are faster than most; use a number "
                ">= 1, for example 3, or null for none"
            )


class Deadline:
    """Time at which a rollout ends at the latest, over all its tries; it can be moved while the rollout runs."""

    def __init__(self, seconds: float) -> None:
        self._begun = asyncio.get_running_loop().time()
        self._ends = self._begun + seconds
        self._scope: asyncio.Timeout | None = None

    @property
    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self._begun

    @property
    def left_s(self) -> float:
        return self._ends - asyncio.get_running_loop().time()

    def scope(self) -> asyncio.Timeout:
        """Return a context for one try: what is awaited inside is cancelled at the deadline. Enter it at once."""
        self._scope = asyncio.timeout_at(self._ends)
        return self._scope

    def bring_forward(self, seconds: float) -> None:
        """Move to ``seconds`` after the beginning, if that is earlier."""
        self._move(min(self._ends, self._begun + seconds))

    def postpone(self, seconds: float) -> None:
        """Move beginning and end ``seconds`` later: so much time was not the rollout's own."""
        self._begun += seconds
        self._move(self._ends + seconds)

    def _move(self, ends: float) -> None:
        self._ends = ends
        if self._scope is not None:
            with suppress(RuntimeError):  # the scope is left already
                self._scope.reschedule(ends)
