"""What an environment and a world are: the seams between rollouts and whatever answers the agent."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from backtalk.messages import Message, ToolCall, ToolSpec
from backtalk.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Step:
    """What the world answered. ``timed_out`` and ``truncated`` are counted in the trajectory's stats."""

    messages: tuple[Message, ...]
    done: bool = False
    submitted: bool = False
    timed_out: bool = False
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class WorldReport:
    """What a world is, in a line for people, and what they should know of it."""

    name: str
    warnings: tuple[str, ...] = ()


class Env(Protocol):
    """One episode of one task.

    Raises:
        InfrastructureError: from any method, when the world broke. A failed command is a Step.
    """

    @property
    def tools(self) -> tuple[ToolSpec, ...]: ...

    async def reset(self) -> tuple[Message, ...]:
        """Build the world and say what is to be done."""
        ...

    async def step(self, call: ToolCall) -> Step:
        """Carry out one call."""
        ...

    async def score(self) -> float | None:
        """The reward, once, after the end; None where nobody scores this task. VerifierError when invalid."""
        ...


class World(Protocol):
    """Where the tasks of one kind are played. Made once for a run, and closed with it."""

    @property
    def report(self) -> WorldReport: ...

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """A fresh episode of the task, over when the context is left.

        Raises:
            InfrastructureError: on entry, when the world cannot be had. It costs this rollout.
        """
        ...

    async def close(self) -> None:
        """Give back what the world holds: a server that it started, connections, sandboxes kept ready."""
        ...
