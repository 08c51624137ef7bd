"""Aggregate scores of tasks and seeds as rliable defines them (Agarwal et al. 2021, arXiv 2108.13264).

The intervals are by the study's own bootstrap, over seeds and tasks together; rliable draws runs within each task.
S seeds, T tasks, R resamples. *_ST is [S, T].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backtalk.run.estimates import Interval, Parts, Resampled, resamples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CUT = 0.25  # of the sorted scores, at either end


@dataclass(frozen=True, slots=True)
class Scores:
    """Aggregates of one metric of one arm after training, over the scores of single tasks in single runs."""

    arm: str
    metric: str
    iqm: Interval | None  # interquartile mean
    improvement: Interval | None  # probability of improvement over the first arm; None for that arm itself


def scores(arm: str, metric: str, end: Sequence[Parts], first: Sequence[Parts] | None) -> Scores:
    """Return the aggregates of an arm from its last evaluations, one a seed, and those of the first arm."""
    own = task_scores([end])
    both = None if first is None else task_scores([end, first])
    improvement = None if both is None else _interval(probability_of_improvement, *both)
    return Scores(arm, metric, None if own is None else _interval(interquartile_mean, *own), improvement)


def task_scores(arms: Sequence[Sequence[Parts]]) -> list[NDArray[np.float64]] | None:
    """Return each arm's scores [S, T] of the tasks that all seeds of all arms have; None where there are none."""
    import numpy as np

    every = [parts for seeds in arms for parts in seeds]
    tasks = [task for task in every[0] if all(parts.get(task, (0.0, 0.0))[1] > 0 for parts in every)]
    if not tasks:
        return None
    return [np.array([[parts[t][0] / parts[t][1] for t in tasks] for parts in seeds]) for seeds in arms]


def interquartile_mean(scores_ST: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the middle half of all scores: a quarter of them, rounded down, is cut at either end."""
    import numpy as np

    flat = np.sort(scores_ST.reshape(*scores_ST.shape[:-2], -1), axis=-1)
    cut = int(CUT * flat.shape[-1])
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def probability_of_improvement(scores_ST: NDArray[np.float64], first_ST: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the chance that a run of one arm is better than one of the first arm at a task, mean over tasks.

    All runs of either arm are compared with each other, not in pairs of one seed; equal scores count as one half.
    """
    one, other = scores_ST[..., :, None, :], first_ST[..., None, :, :]
    return ((one > other) + 0.5 * (one == other)).mean((-3, -2, -1))


def _interval(statistic: Callable[..., NDArray[np.float64]], *arms_ST: NDArray[np.float64]) -> Interval:
    """Return a statistic of some arms' scores with its bootstrap interval; a resample has the same seeds in each."""
    import numpy as np

    value, (num_seeds, num_tasks) = float(statistic(*arms_ST)), arms_ST[0].shape
    if num_seeds == num_tasks == 1:
        return Interval(value)
    seeds_RS, tasks_RT = resamples(num_seeds, num_tasks)
    draws = [
        statistic(*(scores_ST[seeds_S[:, None], tasks_T] for scores_ST in arms_ST))
        for seeds_S, tasks_T in zip(seeds_RS, tasks_RT, strict=True)
    ]
    return Resampled(value, np.array(draws)).interval
