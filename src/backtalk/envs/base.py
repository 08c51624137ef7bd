"""What an environment and a world are: the seams between rollouts and whatever answers the agent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from backtalk.messages import Message, ToolCall, ToolSpec
from backtalk.tasks.task import Split, Task


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
    """A kind of environment with the tasks that are played in it. Made once for a run, and closed with it."""

    @property
    def report(self) -> WorldReport: ...

    def tasks(self, split: Split, count: int, seed: int) -> Sequence[Task]:
        """Return at most ``count`` tasks of a split with distinct ids, the same ones for the same seed.

        Raises:
            ConfigError, DataError, TaskError: there are no such tasks, or they cannot be read.
        """
        ...

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """Open a fresh environment for the task, closed when the context is left.

        Raises:
            InfrastructureError: on entry, when the environment cannot be had. It costs this rollout.
        """
        ...

    async def close(self) -> None:
        """Give back what the world holds: a server that it started, connections, sandboxes kept ready."""
        ...
