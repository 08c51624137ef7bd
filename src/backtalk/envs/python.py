"""Write an environment as a Python class: its tasks, and methods that the policy calls as tools.

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
from backtalk.errors import ConfigError, InfrastructureError
from backtalk.messages import Message, Part, ToolCall, ToolSpec, clean_text
from backtalk.tasks.load import check_unique_ids, draw_tasks
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole


class PythonEnv:
    """One rollout of one task (an ``Env``). Every public method that a subclass adds is a tool.

    A tool's docstring and the type hints of its arguments are what the policy is told. It returns the observation as
    text, or nothing, and may be ``async``; ``self.done = True`` ends the rollout. An exception that it raises is a
    fault of the environment: the rollout has no reward. Report what the policy did wrong by returning it.
    """

    system = "Call tools to do the task."
    """The system message."""

    def __init__(self, task: Task) -> None:
        self.task, self.done = task, False

    def reward(self) -> float | None:
        """Return the reward after the end of the rollout; None where nobody scores the task."""
        return None

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(_specs(type(self)).values())

    async def reset(self) -> tuple[Message, ...]:
        """Return the system message and the task's instruction."""
        texts = (("system", self.system), ("user", self.task.instruction))
        return tuple(Message(role, (Part(text, TokenRole.CONTEXT),)) for role, text in texts if text)

    async def step(self, call: ToolCall) -> Step:
        """Call the tool's method; what it returns is the observation.

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
            where = f"{type(self).__name__}.{call.tool}({dict(call.arguments)})"
            raise InfrastructureError(f"{where} raised {type(error).__name__}: {error}") from error
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
        """Return every task, of both splits: one in five is held out, by a hash of its id, unless ``fold`` says so."""
        raise NotImplementedError(f"{type(self).__name__} brings no tasks; write its all_tasks(self)")

    @property
    def report(self) -> WorldReport:
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
    """Return the tools of a class by name, in the order in which they are written.

    Raises:
        ConfigError: a method's arguments have no JSON schema, or there is no tool.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        """A JSON schema without titles, which repeat the names and cost tokens."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, PythonEnv) and base is not PythonEnv:
            methods |= {name: value for name, value in vars(base).items() if inspect.isfunction(value)}
    specs = {}
    for name, method in methods.items():
        if name.startswith("_") or hasattr(PythonEnv, name):
            continue
        bound = method.__get__(object())
        try:
            schema = TypeAdapter(bound).json_schema(schema_generator=Untitled)
        except PydanticUserError as error:
            raise ConfigError(
                f"{kind.__name__}.{name} cannot be a tool ({error}); give every argument a type hint that JSON can "
                "hold, or begin its name with an underscore"
            ) from error
        if schema.get("type") != "object":
            raise ConfigError(
                f"{kind.__name__}.{name} takes arguments without names; write them out, as in (self, number: int)"
            )
        specs[name] = ToolSpec(name, inspect.cleandoc(method.__doc__ or name), schema)
    if not specs:
        raise ConfigError(f"{kind.__name__} has no tool; add a public method with a docstring")
    return specs
