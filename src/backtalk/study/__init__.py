"""Arms times seeds, each one training run of its own process, compared with intervals."""

from backtalk.study.runs import (
    Study,
    StudyDone,
    StudyEvent,
    StudyProgress,
    StudyRunDone,
    StudyStarted,
    collect,
    load_study,
    run_study,
)
from backtalk.study.table import ArmResult, Comparison, compare, mean_interval

__all__ = [
    "ArmResult",
    "Comparison",
    "Study",
    "StudyDone",
    "StudyEvent",
    "StudyProgress",
    "StudyRunDone",
    "StudyStarted",
    "collect",
    "compare",
    "load_study",
    "mean_interval",
    "run_study",
]
