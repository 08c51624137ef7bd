"""Estimate the results of a study: each arm before and after, and the arms against the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backtalk.run.estimates import Interval, difference_interval, mean_interval

# name in the table, name in an evaluation
METRICS = (
    ("pass@1", "pass_at_1"),
    ("reward", "reward"),
    ("env CE, recorded", "env_ce_recorded"),
    ("env CE, own", "env_ce_own"),
)

Evaluations = tuple[Mapping[str, Any], Mapping[str, Any]]  # before and after


@dataclass(frozen=True, slots=True)
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
    """Results of a study. ``interval`` says what the intervals are over: "seeds", or "tasks" with a single seed."""

    study: str
    seeds: tuple[int, ...]
    interval: str
    results: tuple[ArmResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as study.json holds it."""
        return asdict(self)


def compare(
    study: str, arms: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], Evaluations]
) -> Comparison:
    """Compare every metric of every arm. Two runs of one seed, or two evaluations of one run, are compared in pairs."""
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
                made = (Interval.from_dict(b.get(key)), Interval.from_dict(a.get(key)), _paired(a, b, key))
                against = _paired(a, runs[arms[0], seeds[0]][1], key)
            against = None if arm == arms[0] else against
            results.append(ArmResult(arm, metric, *made, against_first=against))
    over = "seeds" if len(seeds) > 1 else "tasks"
    return Comparison(study=study, seeds=tuple(seeds), interval=over, results=tuple(results))


def _difference(a: Sequence[float | None], b: Sequence[float | None]) -> Interval | None:
    pairs = zip(a, b, strict=True)
    return mean_interval([None if x is None or y is None else x - y for x, y in pairs])


def _value(evaluation: Mapping[str, Any], key: str) -> float | None:
    interval = evaluation.get(key)
    return None if interval is None else interval["value"]


def _paired(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> Interval | None:
    """Return a - b with a bootstrap over the tasks, both drawn together."""
    parts_a, parts_b = _parts(a, key), _parts(b, key)
    tasks = [task for task in parts_a if task in parts_b]
    if not tasks:
        return None
    return difference_interval([(*parts_a[task], *parts_b[task]) for task in tasks])


def _parts(evaluation: Mapping[str, Any], key: str) -> dict[str, tuple[float, float]]:
    """Return each task's numerator and denominator."""
    match key:
        case "pass_at_1":
            return {t["task_id"]: (t["solved"] / t["scored"], 1.0) for t in evaluation["tasks"] if t["scored"]}
        case "reward":
            return {t["task_id"]: (t["reward_sum"], float(t["scored"])) for t in evaluation["tasks"]}
        case "env_ce_recorded":
            return {t["task_id"]: (t["env_nats"], float(t["env_tokens"])) for t in evaluation["recorded"]}
        case _:
            return {t["task_id"]: (t["env_nats"], float(t["env_tokens"])) for t in evaluation["tasks"]}
