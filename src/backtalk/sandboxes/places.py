"""Lets an environment say that it waits for a place which other rollouts hold, so that they do not wait for it."""

from __future__ import annotations

from contextvars import ContextVar


class Arrival:
    """A rollout whose environment is being opened. This one belongs to no rollout, and is told in vain."""

    def wait(self) -> None:
        """Note that the environment is opened only when another rollout gives something back."""

    def go_on(self) -> None:
        """Note that the environment has its place."""


arrival: ContextVar[Arrival] = ContextVar("arrival", default=Arrival())  # noqa: B039 (it has no state)
