"""Estimates with their 95 % intervals, by a bootstrap over tasks and seeds, and as text.

Evaluations, studies and viewers share them. NumPy is loaded when an interval is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95

# Numerator and denominator of each task in one evaluation, such as nats and tokens.
Parts = Mapping[str, tuple[float, float]]
# Weights of evaluations, the same for all seeds or a list a seed.
Weights = Sequence[float] | Sequence[Sequence[float]]
# Axes in names of arrays: R resamples, S seeds, P evaluations, T tasks, C numerator and denominator.


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


def ratio_interval(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Interval | None:
    """Return sum(a) / sum(b) over pairs (a, b), one a task, with a percentile bootstrap over the tasks.

    A mean is the case b = 1. None where the denominator is 0; no bounds for a single task.
    """
    return combined_interval([[{str(i): pair for i, pair in enumerate(pairs)}]], [1.0], seed)


@dataclass(frozen=True, slots=True)
class Resampled:
    """An estimate, and what it was in each resample; no resamples of one task of one seed."""

    value: float
    draws: NDArray[np.float64]

    @property
    def interval(self) -> Interval:
        """Return the estimate with the percentiles of its resamples."""
        import numpy as np

        known = self.draws[np.isfinite(self.draws)]
        if len(known) == 0:
            return Interval(self.value)
        low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(self.value, float(low), float(high))

    @property
    def p_value(self) -> float | None:
        """Return the two-sided p-value of "the estimate is 0": twice the smaller share of resamples on its other side.

        It is the largest significance at which the percentile interval holds 0, and never below 2 / (resamples + 1).
        """
        import numpy as np

        known = self.draws[np.isfinite(self.draws)]
        if len(known) == 0:
            return None
        beyond = min(int((known <= 0).sum()), int((known >= 0).sum()))
        return min(1.0, 2 * (beyond + 1) / (len(known) + 1))


def combined_interval(evaluations: Sequence[Sequence[Parts]], weights: Weights, seed: int = 0) -> Interval | None:
    """Return the interval of ``combined``; None where that is None."""
    found = combined(evaluations, weights, seed)
    return None if found is None else found.interval


def combined(evaluations: Sequence[Sequence[Parts]], weights: Weights, seed: int = 0) -> Resampled | None:
    """Return the weighted sum of some evaluations' ratios, averaged over seeds, with a bootstrap over seeds and tasks.

    ``evaluations[i][s]`` is evaluation i of seed s; its ratio is sum(a) / sum(b) over its tasks. Weights 1 and -1 give
    the difference of two evaluations, in pairs: a task counts for a seed where all evaluations have it. They are one
    list for all seeds, or one a seed.

    Each resample draws seeds, and tasks once for all of them, because every seed is evaluated on the same tasks: what
    is hard about a task does not average out over seeds (the pigeonhole bootstrap, Owen 2007, arXiv 0710.2478). The
    bounds are percentiles. With one seed they are over the tasks alone. None where a seed's denominator is 0; no bounds
    for one task of one seed.
    """
    import numpy as np

    seeds, weights_SP = list(zip(*evaluations, strict=True)), np.array(weights, dtype=np.float64)
    known = [[task for task in points[0] if all(task in point for point in points)] for points in seeds]
    place = {task: i for i, task in enumerate(dict.fromkeys(task for tasks in known for task in tasks))}
    cells_SPTC = np.zeros((len(seeds), len(evaluations), len(place), 2))
    for s, points in enumerate(seeds):
        for p, point in enumerate(points):
            for task in known[s]:
                cells_SPTC[s, p, place[task]] = point[task]
    if not place or (cells_SPTC[..., 1].sum(-1) <= 0).any():
        return None
    value = float((_ratio(cells_SPTC.sum(2)) * weights_SP).sum(-1).mean())
    num_seeds, num_tasks = len(seeds), len(place)
    if num_seeds == num_tasks == 1:
        return Resampled(value, np.zeros(0))
    seeds_RS, tasks_RT = resamples(num_seeds, num_tasks, seed)
    places = (tasks_RT + num_tasks * np.arange(RESAMPLES)[:, None]).ravel()
    counts_RT = np.bincount(places, minlength=RESAMPLES * num_tasks).reshape(RESAMPLES, num_tasks)
    sums_RSPC = np.tensordot(counts_RT.astype(np.float64), cells_SPTC, axes=(1, 2))
    by_seed_RS = (_ratio(sums_RSPC) * weights_SP).sum(-1)
    return Resampled(value, np.take_along_axis(by_seed_RS, seeds_RS, axis=1).mean(axis=1))


def resamples(num_seeds: int, num_tasks: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the seeds and the tasks of each resample, [R, S] and [R, T]; fixed random numbers."""
    import numpy as np

    draw = np.random.default_rng(seed)
    tasks_RT = draw.integers(num_tasks, size=(RESAMPLES, num_tasks))
    return draw.integers(num_seeds, size=(RESAMPLES, num_seeds)), tasks_RT


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values of a family, corrected for their number by Holm's step-down method (1979).

    Sorted from the smallest, the k-th of m (k from 0) is multiplied by m - k; none is below one before it, or above 1.
    Those that are None are not of the family.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for k, (p, i) in enumerate(order):
        corrected[i] = largest = max(largest, min(1.0, p * (len(order) - k)))
    return corrected


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without any token says nothing
        return sums[..., 0] / sums[..., 1]
