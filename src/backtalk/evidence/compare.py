"""Estimate the results of a study: each arm before, during and after training, and the arms against the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from backtalk.evidence.aggregates import Scores, scores
from backtalk.evidence.budget import REACH_RULE, AtEqual, Reached, Spent, Unit, at_equal, reached
from backtalk.run.estimates import Interval, Parts, combined, combined_interval, holm

# name in the table, name in an evaluation
METRICS = (
    ("pass@1", "pass_at_1"),
    ("reward", "reward"),
    ("env CE, recorded", "env_ce_recorded"),
    ("env CE, own", "env_ce_own"),
    ("invalid calls", "invalid_calls"),
)

# of the environment's output in recorded rollouts, where evaluations measured the world model (evaluation.world_model):
# name in the table, numerator and denominator of a task
KNOWLEDGE = {
    "env CE per byte": ("nats", "bytes"),
    "token accuracy": ("correct", "tokens"),
    "true answer preferred": ("preferred", "pairs"),
    "lines predicted": ("matched_lines", "lines"),
}
SCORES = ("pass_at_1", "reward")  # metrics of which more is better

Evaluations = Mapping[int, Mapping[str, Any]]  # of one run, by step
Curve = Mapping[int, Sequence[Parts]]  # one metric of one arm by step, each a list over seeds


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One metric of one arm, averaged over its seeds. Differences are in pairs of the same seed and task."""

    arm: str
    metric: str
    before: Interval | None
    after: Interval | None
    change: Interval | None  # after - before
    against_first: Interval | None  # after, minus that of the first arm; None for that arm itself
    over_run: Interval | None = None  # mean of the curve over the steps, by trapezoids
    over_run_against_first: Interval | None = None  # None where the arms were evaluated at other steps
    p: float | None = None  # of "after, it is the same as in the first arm"
    p_holm: float | None = None  # corrected for the number of arms that this metric is compared for


@dataclass(frozen=True, slots=True)
class Pair:
    """One metric of one arm minus that of another, neither of them the first; in pairs of the same seed and task."""

    arm: str
    minus: str
    metric: str
    after: Interval | None
    over_run: Interval | None  # of the mean over the run; None where they were evaluated at other steps


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One metric of one arm at one step, averaged over its seeds."""

    arm: str
    metric: str
    step: int
    interval: Interval
    spent: Mapping[Unit, float] | None = None  # by training until then, mean over seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Results of a study. ``interval`` says what the intervals are over: "seeds and tasks", or "tasks" of one seed."""

    study: str
    seeds: tuple[int, ...]
    interval: str
    results: tuple[ArmResult, ...]
    curves: tuple[CurvePoint, ...] = ()
    pairs: tuple[Pair, ...] = ()
    scores: tuple[Scores, ...] = ()
    equal: tuple[AtEqual, ...] = ()
    reached: tuple[Reached, ...] = ()
    reach_rule: str = REACH_RULE
    elsewhere: Mapping[str, tuple[ArmResult, ...]] = field(default_factory=dict)  # results in other worlds, by name

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as study.json holds it."""
        return asdict(self)


def compare(
    study: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    runs: Mapping[tuple[str, int], Evaluations],
    spent: Mapping[tuple[str, int], Spent] | None = None,
) -> Comparison:
    """Compare every metric of every arm, each at the steps at which all its seeds were evaluated.

    ``spent`` is that of the runs; without it nothing is compared at equal budgets.
    """
    steps = {arm: sorted(set.intersection(*(set(runs[arm, seed]) for seed in seeds))) for arm in arms}
    means = _mean_spent(steps, seeds, spent or {})
    found: dict[str, list[Any]] = {"results": [], "curves": [], "pairs": [], "scores": [], "equal": [], "reached": []}
    for metric, key in (*METRICS, *_knowledge_metrics(runs)):
        curves = {arm: {n: [task_parts(runs[arm, seed][n], key) for seed in seeds] for n in steps[arm]} for arm in arms}
        others = {arm: None if arm == arms[0] else curves[arms[0]] for arm in arms}
        results = [_result(arm, metric, curves[arm], others[arm]) for arm in arms]
        corrected = holm([result.p for result in results])
        found["results"] += [replace(r, p_holm=p) for r, p in zip(results, corrected, strict=True)]
        found["pairs"] += [
            Pair(arm, minus, metric, *_differences(curves[arm], curves[minus]))
            for minus, arm in combinations(arms[1:], 2)
        ]
        for arm in arms:
            intervals = [(step, combined_interval([at], [1.0])) for step, at in curves[arm].items()]
            found["curves"] += [CurvePoint(arm, metric, n, i, means.get((arm, n))) for n, i in intervals if i]
        if key in SCORES:
            ends = [list(curves[arm].values())[-1] for arm in arms]
            firsts = [None, *[ends[0]] * (len(arms) - 1)]
            found["scores"] += [scores(a, metric, *pair) for a, *pair in zip(arms, ends, firsts, strict=True)]
        if spent:
            by_seed = {arm: [{n: at[i] for n, at in curves[arm].items()} for i in range(len(seeds))] for arm in arms}
            costs = {arm: [spent[arm, seed] for seed in seeds] for arm in arms}
            for unit in ("rollouts", "tokens", "seconds"):
                found["equal"] += at_equal(metric, by_seed, costs, unit)
            for unit in ("steps", "tokens", "seconds") if key in SCORES else ():
                found["reached"] += reached(metric, by_seed, costs, unit)
    over = "seeds and tasks" if len(seeds) > 1 else "tasks"
    return Comparison(
        study=study,
        seeds=tuple(seeds),
        interval=over,
        results=tuple(found["results"]),
        curves=tuple(found["curves"]),
        pairs=tuple(found["pairs"]),
        scores=tuple(found["scores"]),
        equal=tuple(found["equal"]),
        reached=tuple(found["reached"]),
    )


def _knowledge_metrics(runs: Mapping[tuple[str, int], Evaluations]) -> list[tuple[str, str]]:
    """Return the metrics of the world model that every evaluation has."""
    found = [_known_tasks(evaluation) for run in runs.values() for evaluation in run.values()]
    return [
        (metric, metric)
        for metric, names in KNOWLEDGE.items()
        if found and all(any(task[name] is not None for task in tasks) for tasks in found for name in names)
    ]


def _known_tasks(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tasks of the recorded rollouts on which the world model was measured."""
    measured = evaluation.get("world_model")
    recorded = measured["sets"].get("recorded") if measured else None
    return recorded["tasks"] if recorded else []


def _mean_spent(
    steps: Mapping[str, Sequence[int]], seeds: Sequence[int], spent: Mapping[tuple[str, int], Spent]
) -> dict[tuple[str, int], dict[Unit, float]]:
    """Return the amounts that each arm had spent by each evaluated step, mean over seeds."""
    means: dict[tuple[str, int], dict[Unit, float]] = {}
    for key in [(arm, n) for arm in steps if (arm, seeds[0]) in spent for n in steps[arm]]:
        runs = [spent[key[0], seed][key[1]] for seed in seeds]
        means[key] = {unit: sum(run[unit] for run in runs) / len(runs) for unit in runs[0]}
    return means


def _result(arm: str, metric: str, curve: Curve, first: Curve | None) -> ArmResult:
    """Return an arm's estimates from its curve and that of the first arm, None for that arm itself."""
    steps, at = list(curve), list(curve.values())
    weights, end = trapezoid_weights(steps), list(first.values())[-1] if first else None
    against = None if end is None else combined([at[-1], end], [1.0, -1.0])
    return ArmResult(
        arm,
        metric,
        before=combined_interval([at[0]], [1.0]),
        after=combined_interval([at[-1]], [1.0]),
        change=combined_interval([at[-1], at[0]], [1.0, -1.0]),
        against_first=None if against is None else against.interval,
        over_run=combined_interval(at, weights),
        over_run_against_first=None if first is None else _over_run_difference(curve, first),
        p=None if against is None else against.p_value,
    )


def _differences(curve: Curve, other: Curve) -> tuple[Interval | None, Interval | None]:
    """Return the differences of two arms after training, and of their means over the run."""
    ends = [list(curve.values())[-1], list(other.values())[-1]]
    return combined_interval(ends, [1.0, -1.0]), _over_run_difference(curve, other)


def _over_run_difference(curve: Curve, other: Curve) -> Interval | None:
    """Return the difference of the means over the run; None where the arms were evaluated at other steps."""
    if list(curve) != list(other):
        return None
    weights = trapezoid_weights(list(curve))
    return combined_interval([*curve.values(), *other.values()], [*weights, *(-w for w in weights)])


def trapezoid_weights(steps: Sequence[int]) -> list[float]:
    """Return the weight of each point in the mean of a curve that is linear between its points; they sum to 1."""
    if len(steps) == 1:
        return [1.0]
    ends = [steps[0], *steps, steps[-1]]
    return [(right - left) / 2 / (steps[-1] - steps[0]) for left, right in zip(ends, ends[2:], strict=False)]


def task_parts(evaluation: Mapping[str, Any], key: str) -> Parts:
    """Return each task's numerator and denominator, of the tasks that have been measured."""
    if key in KNOWLEDGE:
        above, below = KNOWLEDGE[key]
        return {t["task_id"]: (t[above], float(t[below])) for t in _known_tasks(evaluation)}
    tasks = evaluation["recorded" if key == "env_ce_recorded" else "tasks"]
    match key:
        case "pass_at_1":
            return {t["task_id"]: (t["solved"] / t["scored"], 1.0) for t in tasks if t["scored"]}
        case "reward":
            return {t["task_id"]: (t["reward_sum"], float(t["scored"])) for t in tasks}
        case "invalid_calls":  # evaluations of older versions do not have it
            return {t["task_id"]: (t[key], float(t["rollouts"])) for t in tasks if key in t}
        case _:
            return {t["task_id"]: (t["env_nats"], float(t["env_tokens"])) for t in tasks}
