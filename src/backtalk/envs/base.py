"""Define the protocols of environments: ``Env`` answers the agent in one rollout, ``World`` opens one for a task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole


@dataclass(frozen=True, slots=True)
class Step:
    """An environment's answer to one action. ``timed_out`` and ``truncated`` are counted in the trajectory's stats."""

    messages: tuple[Message, ...]
    done: bool = False
    submitted: bool = False
    timed_out: bool = False
    truncated: bool = False


def warning_step(call: ToolCall, text: str) -> Step:
    """Return the harness's own answer to a call that the environment does not carry out."""
    return Step((Message("tool", (Part(text, TokenRole.WARNING),), tool=call.tool),))


def text_tool(name: str, description: str, argument: str, meaning: str) -> ToolSpec:
    """Return a tool that takes one text."""
    argument_schemas = {argument: {"type": "string", "description": meaning}}
    return ToolSpec(name, description, {"type": "object", "properties": argument_schemas, "required": [argument]})


@dataclass(frozen=True, slots=True)
class WorldReport:
    """A world's name in one line, and warnings to show the user."""

    name: str
    warnings: tuple[str, ...] = ()


class Env(Protocol):
    """An environment for one rollout of one task.

    One may also have ``metrics``, numbers by name that are kept in the trajectory's stats beside the reward.

    Raises:
        InfrastructureError: from any method, when the environment broke. A failed command is a Step.
    """

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools that the policy may call."""
        ...

    async def reset(self) -> tuple[Message, ...]:
        """Set the task up and return the first messages: the system message and the instruction."""
        ...

    async def step(self, call: ToolCall) -> Step:
        """Carry out one tool call."""
        ...

    async def score(self) -> float | None:
        """Return the reward; called once, after the end. None for a task that is not scored.

        Raises:
            VerifierError: the verifier gave no valid reward.
        """
        ...


class World(Protocol):
    """A kind of environment with its tasks. Made once for a run, and closed with it."""

    @property
    def report(self) -> WorldReport:
        """Return the world's name and warnings."""
        ...

    def tasks(self, split: Split, count: int, seed: int) -> Sequence[Task]:
        """Return at most ``count`` tasks of a split with distinct ids, the same ones for the same seed.

        Raises:
            ConfigError, DataError, TaskError: there are no such tasks, or they cannot be read.
        """
        ...

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """Open a fresh environment for the task, closed when the context is left.

        Raises:
            InfrastructureError: on entry, when it cannot be opened. Only this rollout is lost.
        """
        ...

    async def close(self) -> None:
        """Release what the world holds: a server that it started, connections, sandboxes kept ready."""
        ...
