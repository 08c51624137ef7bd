"""Write an environment as two Python classes: one with the tools that the policy calls, one with the tasks.

    class Guess(PythonEnv):
        def guess(self, number: int) -> str:
            \"""Compare a number with the hidden one.\"""
            self.done = number == self.task.metadata["hidden"]
            return "right" if self.done else "wrong"

        def reward(self) -> float:
            return float(self.done)

    class GuessWorld(PythonWorld):
        env = Guess

        def all_tasks(self):
            return [Task(id=f"guess/{n}", instruction="Find my number.", metadata={"hidden": n}) for n in range(100)]

``tasks.source: my_module:GuessWorld`` trains on it. docs/worlds.md.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, ClassVar

from backtalk.envs.base import Step, WorldReport
from backtalk.envs.tool_schemas import plain_schema
from backtalk.errors import ConfigError, InfrastructureError
from backtalk.messages import Message, Part, ToolCall, ToolSpec, clean_text
from backtalk.tasks.load import check_unique_ids, draw_tasks
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole


class PythonEnv:
    """The environment of one rollout of one task (an ``Env``). Each public method that a subclass adds is a tool.

    The policy reads a tool's docstring and the type hints of its arguments. A tool returns the observation as text, or
    nothing, and may be ``async``; ``self.done = True`` ends the rollout. An exception in it is a fault of the
    environment: the rollout has no reward. Return mistakes of the policy as text.
    """

    system = "Call tools to do the task."
    """System message."""

    def __init__(self, task: Task) -> None:
        self.task, self.done = task, False

    def reward(self) -> float | None:
        """Return the reward after the end of the rollout; None for a task that is not scored."""
        return None

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(_specs(type(self)).values())

    async def reset(self) -> tuple[Message, ...]:
        texts = (("system", self.system), ("user", self.task.instruction))
        return tuple(Message(role, (Part(text, TokenRole.CONTEXT),)) for role, text in texts if text)

    async def step(self, call: ToolCall) -> Step:
        """Call the tool's method and return its text as the observation.

        Raises:
            InfrastructureError: the method raised an exception.
        """
        if call.tool not in _specs(type(self)):
            return self._answer(call, f"[unknown tool {call.tool}]", TokenRole.WARNING)
        try:
            result = getattr(self, call.tool)(**call.arguments)
            if inspect.isawaitable(result):
                result = await result
        except InfrastructureError:
            raise
        except Exception as error:
            place = f"{type(self).__name__}.{call.tool}({dict(call.arguments)})"
            raise InfrastructureError(f"{place} raised {type(error).__name__}: {error}") from error
        return self._answer(call, "" if result is None else str(result), TokenRole.ENV_OUTPUT)

    async def score(self) -> float | None:
        """Return ``reward()``; None for a task that is ``world_model_only``."""
        return None if self.task.world_model_only else self.reward()

    def _answer(self, call: ToolCall, text: str, role: TokenRole) -> Step:
        parts = (Part(clean_text(text), role),) if text else ()
        return Step((Message("tool", parts, tool=call.tool),), done=self.done)


class PythonWorld:
    """Tasks and the class of their environments (a ``World``). A subclass sets ``env`` and writes ``all_tasks``."""

    env: ClassVar[type[PythonEnv]]

    def all_tasks(self) -> Sequence[Task]:
        """Return the tasks of both splits: one in five is held out, by a hash of its id, unless it has a ``fold``."""
        raise NotImplementedError(f"{type(self).__name__} brings no tasks; write its all_tasks(self)")

    @property
    def report(self) -> WorldReport:
        """Return the class's import path, and that its code is not isolated."""
        return WorldReport(f"{type(self).__module__}:{type(self).__name__}", ("its code runs in this process",))

    def tasks(self, split: Split, count: int, seed: int) -> Sequence[Task]:
        """Return at most ``count`` tasks of a split, drawn by ``seed``.

        Raises:
            TaskError: two tasks share an id.
        """
        tasks = self.all_tasks()
        check_unique_ids((task, type(self).__name__) for task in tasks)
        return draw_tasks(tasks, split, count, seed)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[PythonEnv]:
        """Open an environment: an instance of ``env``. Override it for what has to be closed again."""
        yield self.env(task)

    async def close(self) -> None:
        """Do nothing; override it for what has to be closed with the run."""


@cache
def _specs(kind: type[PythonEnv]) -> dict[str, ToolSpec]:
    """Return the tools of a class by name, in the order in which they are written."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    names = dict.fromkeys(name for base in reversed(kind.__mro__) if issubclass(base, PythonEnv) for name in vars(base))
    specs = {}
    for name in names:
        method = inspect.getattr_static(kind, name)
        if name.startswith("_") or hasattr(PythonEnv, name) or not inspect.isfunction(method):
            continue
        bound: Any = method.__get__(object())
        try:
            schema = TypeAdapter(bound).json_schema()
        except PydanticUserError as error:
            raise ConfigError(
                f"{kind.__name__}.{name} cannot be a tool ({error}); give every argument a type hint that JSON can "
                "hold, or begin its name with an underscore"
            ) from error
        if schema.get("type") != "object":
            raise ConfigError(
                f"{kind.__name__}.{name} takes arguments without names; write them out, as in (self, number: int)"
            )
        specs[name] = ToolSpec(name, inspect.cleandoc(method.__doc__ or name), plain_schema(schema, schema))
    if not specs:
        raise ConfigError(f"{kind.__name__} has no tool; add a public method with a docstring")
    return specs
