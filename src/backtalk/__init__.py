"""Train language model agents on rewards and on the observations that their environment returns.

This file stays light: it loads neither torch nor any other heavy library. Import the parts you need from
their own modules, for example ``from backtalk.objective import objective``.
"""

from backtalk.errors import BacktalkError
from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

__version__ = "0.1.0"

__all__ = [
    "BacktalkError",
    "Segment",
    "StopReason",
    "TokenRole",
    "Trajectory",
    "TrajectoryGroup",
    "__version__",
]
