"""One training run: rollouts in real sandboxes, one optimizer step on each batch of them, measured before and after.

What happens at a step depends only on the settings, the seed and the step's number. So a run that was killed
and resumed from its checkpoint goes on to the same numbers as one that was not.
"""

from backtalk.train.benchmark import Benchmark, BenchmarkResult, run_benchmark
from backtalk.train.events import (
    EvaluationDone,
    Event,
    Notice,
    OnEvent,
    RolloutDone,
    RunDone,
    RunStarted,
    StepDone,
)
from backtalk.train.run import evaluate_run, train

__all__ = [
    "Benchmark",
    "BenchmarkResult",
    "EvaluationDone",
    "Event",
    "Notice",
    "OnEvent",
    "RolloutDone",
    "RunDone",
    "RunStarted",
    "StepDone",
    "evaluate_run",
    "run_benchmark",
    "train",
]
