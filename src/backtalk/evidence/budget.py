"""Compare arms at equal rollouts, tokens or seconds of training, and by the amount that reaches the control's best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

from backtalk.run.estimates import Interval, Parts, Resampled, combined_interval, resamples

Unit = Literal["steps", "rollouts", "tokens", "seconds"]
UNITS: tuple[Unit, ...] = get_args(Unit)
Spent = Mapping[int, Mapping[Unit, float]]  # of one run's training, by the number of steps done

REACH_RULE = (
    "In each seed, the control's best is the highest value of the first arm's evaluations after the start. An arm "
    "reaches it at its first evaluation after the start, in the same seed, that is at least as high; a run in which "
    "none is is censored at its end, and its speed-up counts as 0. Speed-ups are the control's amount over the arm's, "
    "median over seeds, with an interval over seeds."
)


@dataclass(frozen=True, slots=True)
class AtEqual:
    """One metric of one arm where every run of the study has spent the same, between two evaluations linearly."""

    arm: str
    metric: str
    unit: Unit
    amount: float
    value: Interval | None
    against_first: Interval | None  # in pairs of seed and task; None for the first arm itself


@dataclass(frozen=True, slots=True)
class Reached:
    """Amount that an arm had spent when it reached the best of the first arm, by seed; see ``REACH_RULE``."""

    arm: str
    metric: str
    unit: Unit
    best: tuple[float, ...]  # of the first arm
    amounts: tuple[float | None, ...]  # None: censored
    ended: tuple[float, ...]  # amount at the end of each run
    speedup: Interval


def spent_by_step(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[Unit, float]]:
    """Return the steps, rollouts, tokens and seconds that training had spent after each step, from its metrics.

    Tokens are all of its rollouts: prompts, actions and observations. Seconds are of rollouts and updates, without
    evaluations; runs side by side slow each other down.
    """
    total: dict[Unit, float] = dict.fromkeys(UNITS, 0.0)
    spent = {0: dict(total)}
    for row in rows:
        seconds = (row.get("rollout_seconds") or 0.0) + (row.get("train_seconds") or 0.0)
        total["steps"] += 1
        total["rollouts"] += row.get("rollouts") or 0
        total["tokens"] += round((row.get("tokens_per_second") or 0.0) * seconds)
        total["seconds"] += seconds
        spent[row["step"] + 1] = dict(total)
    return spent


def at_equal(
    metric: str, curves: Mapping[str, Sequence[Mapping[int, Parts]]], spent: Mapping[str, Sequence[Spent]], unit: Unit
) -> list[AtEqual]:
    """Compare the arms at the largest amount that every run has spent; ``curves`` and ``spent`` are by arm and seed."""
    runs = [pair for arm in curves for pair in zip(curves[arm], spent[arm], strict=True)]
    amount = min(run[max(curve)][unit] for curve, run in runs)
    points = {
        arm: [_between(c, run, unit, amount) for c, run in zip(curves[arm], spent[arm], strict=True)] for arm in curves
    }
    results, first = [], next(iter(curves))
    for arm, at in points.items():
        low, high, shares = zip(*at, strict=True)
        value = combined_interval([low, high], [[1 - share, share] for share in shares])
        against = None
        if arm != first:
            low1, high1, shares1 = zip(*points[first], strict=True)
            weights = [[1 - a, a, b - 1, -b] for a, b in zip(shares, shares1, strict=True)]
            against = combined_interval([low, high, low1, high1], weights)
        results.append(AtEqual(arm, metric, unit, amount, value, against))
    return results


def _between(curve: Mapping[int, Parts], spent: Spent, unit: Unit, amount: float) -> tuple[Parts, Parts, float]:
    """Return the evaluations before and after an amount, and how far it is from the one to the other, 0 to 1."""
    steps = sorted(curve)
    after = next((step for step in steps if spent[step][unit] >= amount), steps[-1])
    before = max((step for step in steps if spent[step][unit] <= amount), default=after)
    low, high = spent[before][unit], spent[after][unit]
    return curve[before], curve[after], (amount - low) / (high - low) if high > low else 0.0


def reached(
    metric: str, curves: Mapping[str, Sequence[Mapping[int, Parts]]], spent: Mapping[str, Sequence[Spent]], unit: Unit
) -> list[Reached]:
    """Return the amount of ``unit`` that each arm spent to reach the first arm's best.

    None where a run was not evaluated after its start, or its metrics do not say what it had spent by then.
    """
    values = {arm: [_means(curve) for curve in curves[arm]] for arm in curves}
    runs = [pair for arm in curves for pair in zip(values[arm], spent[arm], strict=True)]
    if not all(known and run[min(known)][unit] > 0 for known, run in runs):
        return []
    first = next(iter(curves))
    best = [max(known.values()) for known in values[first]]
    amounts = {
        arm: [
            next((run[n][unit] for n in sorted(known) if known[n] >= top), None)
            for known, run, top in zip(values[arm], spent[arm], best, strict=True)
        ]
        for arm in curves
    }
    results = []
    for arm in curves:
        pairs = zip(amounts[arm], amounts[first], strict=True)
        ratios = [0.0 if own is None else control / own for own, control in pairs if control is not None]
        ended = tuple(run[max(known)][unit] for known, run in zip(values[arm], spent[arm], strict=True))
        results.append(Reached(arm, metric, unit, tuple(best), tuple(amounts[arm]), ended, _median_interval(ratios)))
    return results


def _means(curve: Mapping[int, Parts]) -> dict[int, float]:
    """Return the ratio of each evaluation after the start at which anything was measured."""
    sums = {n: [sum(column) for column in zip((0.0, 0.0), *at.values(), strict=True)] for n, at in curve.items() if n}
    return {n: total / weight for n, (total, weight) in sums.items() if weight > 0}


def _median_interval(values: Sequence[float]) -> Interval:
    """Return the median over seeds with its bootstrap interval over seeds; no bounds for one seed."""
    import numpy as np

    if len(values) == 1:
        return Interval(values[0])
    seeds_RS, _ = resamples(len(values), 1)
    return Resampled(median(values), np.median(np.array(values)[seeds_RS], axis=1)).interval
