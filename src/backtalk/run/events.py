"""Events of a run while it goes on, for a display, a tracker or a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backtalk.envs.base import Env, WorldReport
from backtalk.rollout.rollout import EnvFactory
from backtalk.run.evaluate import Evaluation
from backtalk.tasks.task import Task


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins, at ``first_step`` if it is resumed."""

    folder: Path
    first_step: int
    steps: int
    worlds: tuple[WorldReport, ...]


@dataclass(frozen=True, slots=True)
class RolloutDone:
    """A rollout ended. ``phase`` is "training" or "evaluation"; counts are of that step's rollouts."""

    phase: str
    step: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """A training step is recorded. ``metrics`` are those of metrics.jsonl."""

    step: int
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    """An evaluation is recorded."""

    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class WorldModelMeasured:
    """What a policy knows of its environment is measured, and written to ``path``."""

    measured: dict[str, Any]
    path: Path


@dataclass(frozen=True, slots=True)
class Notice:
    """A line that a person should read, such as a warning."""

    text: str


@dataclass(frozen=True, slots=True)
class RunDone:
    """A run ended after ``step`` steps; ``finished`` is False if it was asked to stop before the last."""

    folder: Path
    step: int
    finished: bool


Event = RunStarted | RolloutDone | StepDone | EvaluationDone | WorldModelMeasured | Notice | RunDone
OnEvent = Callable[[Event], None]


def report_rollouts(open_env: EnvFactory, phase: str, step: int, total: int, on_event: OnEvent) -> EnvFactory:
    """Return ``open_env`` with a ``RolloutDone`` event for every environment that is closed."""
    done = 0

    @asynccontextmanager
    async def open_and_report(task: Task) -> AsyncIterator[Env]:
        nonlocal done
        try:
            async with open_env(task) as env:
                yield env
        finally:
            done += 1
            on_event(RolloutDone(phase, step, done, total))

    return open_and_report
