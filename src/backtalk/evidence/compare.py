"""Estimates of a study: each arm before and after, and the arms against the first one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backtalk.run.evaluate import Interval, difference_interval

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal's is within 2 %.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
_NORMAL = 1.960

# name in the table, name in an evaluation
METRICS = (
    ("pass@1", "pass_at_1"),
    ("reward", "reward"),
    ("env CE, recorded", "env_ce_recorded"),
    ("env CE, own", "env_ce_own"),
)

Evaluations = tuple[Mapping[str, Any], Mapping[str, Any]]  # before and after


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One metric of one arm, over its seeds."""

    arm: str
    metric: str
    before: Interval | None
    after: Interval | None
    change: Interval | None  # after - before, paired by seed or task
    against_first: Interval | None  # after, minus that of the first arm; None for that arm itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a study found. ``interval`` says what the intervals are over: "seeds", or "tasks" with a single seed."""

    study: str
    seeds: tuple[int, ...]
    interval: str
    results: tuple[ArmResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as study.json holds it."""
        return asdict(self)


def compare(
    study: str, arms: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], Evaluations]
) -> Comparison:
    """Every metric of every arm. Two runs of one seed, or two evaluations of one run, are compared in pairs."""
    results = []
    for metric, key in METRICS:
        for arm in arms:
            before, after = ([_value(runs[arm, seed][i], key) for seed in seeds] for i in (0, 1))
            first = [_value(runs[arms[0], seed][1], key) for seed in seeds]
            if len(seeds) > 1:
                made = (mean_interval(before), mean_interval(after), _difference(after, before))
                against = _difference(after, first)
            else:
                b, a = runs[arm, seeds[0]]
                made = (_interval(b.get(key)), _interval(a.get(key)), _paired(a, b, key))
                against = _paired(a, runs[arms[0], seeds[0]][1], key)
            results.append(
                ArmResult(
                    arm=arm,
                    metric=metric,
                    before=made[0],
                    after=made[1],
                    change=made[2],
                    against_first=None if arm == arms[0] else against,
                )
            )
    over = "seeds" if len(seeds) > 1 else "tasks"
    return Comparison(study=study, seeds=tuple(seeds), interval=over, results=tuple(results))


def mean_interval(values: Sequence[float | None]) -> Interval | None:
    """Mean of independent values with Student's 95 % interval; None unless every value is there."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    n, mean = len(known), math.fsum(known) / len(known)
    if n < 2:
        return Interval(mean)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1) / n)
    half = (_T[n - 2] if n - 2 < len(_T) else _NORMAL) * error
    return Interval(mean, mean - half, mean + half)


def _difference(a: Sequence[float | None], b: Sequence[float | None]) -> Interval | None:
    pairs = zip(a, b, strict=True)
    return mean_interval([None if x is None or y is None else x - y for x, y in pairs])


def _value(evaluation: Mapping[str, Any], key: str) -> float | None:
    interval = evaluation.get(key)
    return None if interval is None else interval["value"]


def _interval(data: Mapping[str, Any] | None) -> Interval | None:
    return None if data is None else Interval(**data)


def _paired(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> Interval | None:
    """a - b with a bootstrap over the tasks, both drawn together."""
    parts_a, parts_b = _parts(a, key), _parts(b, key)
    tasks = [task for task in parts_a if task in parts_b]
    if not tasks:
        return None
    return difference_interval([(*parts_a[task], *parts_b[task]) for task in tasks])


def _parts(evaluation: Mapping[str, Any], key: str) -> dict[str, tuple[float, float]]:
    """Each task's numerator and denominator."""
    match key:
        case "pass_at_1":
            return {t["task_id"]: (t["solved"] / t["scored"], 1.0) for t in evaluation["tasks"] if t["scored"]}
        case "reward":
            return {t["task_id"]: (t["reward_sum"], float(t["scored"])) for t in evaluation["tasks"]}
        case "env_ce_recorded":
            return {t["task_id"]: (t["env_nats"], float(t["env_tokens"])) for t in evaluation["recorded"]}
        case _:
            return {t["task_id"]: (t["env_nats"], float(t["env_tokens"])) for t in evaluation["tasks"]}
