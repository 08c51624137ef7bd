"""Estimates with their 95 % intervals: over tasks by a bootstrap, over seeds by Student's t, and as text.

Evaluations, studies and viewers share them. NumPy and SciPy are loaded when an interval is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval; the bounds are None if too little was measured."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Interval | None:
        """Return the interval that a file holds as plain data; None if nothing was measured."""
        return None if data is None else cls(**data)


def interval_text(interval: Interval | None, form: str = "{:.3f}") -> str:
    """Return text such as ``0.250 [0.188, 0.312]``; a dash for None. ``form`` formats each number."""
    if interval is None:
        return "-"
    text = form.format(interval.value)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{form.format(interval.low)}, {form.format(interval.high)}]"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that at least one of k rollouts solves the task, of c solved in n: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374), where 1 - (1 - c/n)^k would be too low.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {c} solved in {n} rollouts: needs 0 <= solved <= rollouts and 1 <= k <= rollouts"
        )
    return 1.0 - comb(n - c, k) / comb(n, k)


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 of no values."""
    return float(sum(values)) / len(values) if values else 0.0


def mean_interval(values: Sequence[float | None]) -> Interval | None:
    """Return the mean of independent values with Student's interval; None unless every value is there."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    n, middle = len(known), math.fsum(known) / len(known)
    if n < 2:
        return Interval(middle)
    from scipy.special import stdtrit  # quantiles of Student's t

    error = math.sqrt(math.fsum((value - middle) ** 2 for value in known) / (n - 1) / n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Interval(middle, middle - half, middle + half)


def ratio_interval(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Interval | None:
    """Return sum(a) / sum(b) over pairs (a, b), one a task, with a percentile bootstrap over the tasks.

    A mean is the case b = 1. None where the denominator is 0; no bounds for a single task.
    """
    if sum(b for _, b in pairs) <= 0:
        return None
    return _bootstrap(pairs, _ratio, seed)


def difference_interval(rows: Sequence[tuple[float, float, float, float]], seed: int = 0) -> Interval | None:
    """Return sum(a) / sum(b) - sum(c) / sum(d) over rows (a, b, c, d), one a task, so that both see the same tasks."""
    if sum(row[1] for row in rows) <= 0 or sum(row[3] for row in rows) <= 0:
        return None
    return _bootstrap(rows, lambda sums: _ratio(sums[..., :2]) - _ratio(sums[..., 2:]), seed)


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without any token says nothing
        return sums[..., 0] / sums[..., 1]


def _bootstrap(
    rows: Sequence[Sequence[float]], statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], seed: int
) -> Interval:
    """Return a statistic of column sums, with a percentile bootstrap over the rows; no bounds for a single row."""
    import numpy as np

    numbers = np.array(rows, dtype=np.float64)
    value = float(statistic(numbers.sum(axis=0)))
    if len(numbers) < 2:
        return Interval(value)
    picks = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    drawn = statistic(numbers[picks].sum(axis=1))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
