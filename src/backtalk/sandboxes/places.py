"""Tell the scheduler of rollouts that one waits for a sandbox or a server slot which other rollouts hold."""

from __future__ import annotations

from contextvars import ContextVar


class Arrival:
    """A rollout whose environment is being opened. This base class does nothing; it stands for no rollout."""

    def wait(self) -> None:
        """Note that the environment can open only after another rollout ends, so that others do not wait for it."""

    def go_on(self) -> None:
        """Note that the environment waits no longer."""


arrival: ContextVar[Arrival] = ContextVar("arrival", default=Arrival())  # noqa: B039 (it has no state)
