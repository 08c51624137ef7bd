"""What a run tells while it goes on; a display, a tracker or a test listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backtalk.envs.base import WorldReport
from backtalk.run.evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class RunStarted:
    folder: Path
    first_step: int
    steps: int
    worlds: tuple[WorldReport, ...]


@dataclass(frozen=True, slots=True)
class RolloutDone:
    """``phase`` is "training" or "evaluation"; counts are of that step's rollouts."""

    phase: str
    step: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """``metrics`` are what metrics.jsonl holds for this step."""

    step: int
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know and nobody asked for."""

    text: str


@dataclass(frozen=True, slots=True)
class RunDone:
    folder: Path
    step: int  # steps done so far
    finished: bool  # False where it was asked to stop before the last step


Event = RunStarted | RolloutDone | StepDone | EvaluationDone | Notice | RunDone
OnEvent = Callable[[Event], None]
