"""Statistics of studies against numbers worked out by hand: aggregates, corrections, equal budgets, censoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from backtalk.evidence.aggregates import interquartile_mean, probability_of_improvement, scores, task_scores
from backtalk.evidence.budget import AtEqual, Unit, at_equal, reached, spent_by_step
from backtalk.run.estimates import Interval, Parts, combined, holm


def by_task(*values: float) -> Parts:
    return {str(i): (value, 1.0) for i, value in enumerate(values)}


# ---------------------------------------------------------------- aggregates


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    # two runs at four tasks, sorted 0 0 .1 .2 .4 .6 .9 1: two of eight are cut at either end, (.1 + .2 + .4 + .6) / 4
    assert interquartile_mean(np.array([[0.9, 0.0, 0.2, 0.4], [0.1, 1.0, 0.0, 0.6]])) == pytest.approx(0.325)
    # of six scores int(0.25 * 6) = 1 is cut: (1 + 2 + 3 + 4) / 4
    assert interquartile_mean(np.array([[5.0, 0.0, 1.0, 2.0, 3.0, 4.0]])) == pytest.approx(2.5)


def test_the_probability_of_improvement_compares_all_runs_of_a_task_and_counts_ties_half() -> None:
    # task 0: .5 against .5 and .25: 1/2 and 1; 1 against both: 1 and 1: 3.5 of 4.
    # task 1: 0 against 1 and 0: 0 and 1/2; 0.5 against 1 and 0: 0 and 1: 1.5 of 4.
    one, other = np.array([[0.5, 0.0], [1.0, 0.5]]), np.array([[0.5, 1.0], [0.25, 0.0]])
    assert probability_of_improvement(one, other) == pytest.approx((3.5 / 4 + 1.5 / 4) / 2)
    assert probability_of_improvement(one, other) + probability_of_improvement(other, one) == pytest.approx(1.0)


def test_aggregates_have_intervals_over_seeds_and_tasks_and_leave_out_tasks_that_a_run_lacks() -> None:
    better = [by_task(1.0, 1.0, 1.0), by_task(1.0, 1.0, 1.0, 0.0)]
    worse = [by_task(0.0, 0.5, 0.0, 1.0), by_task(0.5, 0.0, 0.0, 1.0)]
    found = scores("echo", "pass@1", better, worse)
    assert found.improvement == Interval(1.0, 1.0, 1.0)  # at each of the three common tasks
    assert found.iqm == Interval(1.0, 1.0, 1.0)
    first = scores("grpo", "pass@1", worse, None)
    assert first.improvement is None and first.iqm and first.iqm.low is not None
    assert first.iqm.low < first.iqm.value == pytest.approx((0 + 0 + 0.5 + 0.5) / 4)  # of 0 0 0 0 .5 .5 1 1
    assert task_scores([[by_task(1.0)], [{}]]) is None


# ---------------------------------------------------------------- many arms


def test_holm_multiplies_the_smallest_by_the_number_of_arms_and_never_goes_down() -> None:
    # 0.01 * 3, 0.02 * 2, then 0.03 * 1, which is not below 0.04
    assert holm([0.03, None, 0.01, 0.02]) == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([None]) == [None]


def test_the_p_value_is_twice_the_share_of_resamples_beyond_zero() -> None:
    # one seed, two tasks with differences 1 and -1: all of one task in a quarter of the resamples each, else exactly 0
    both = combined([[by_task(1.0, 0.0)], [by_task(0.0, 1.0)]], [1.0, -1.0])
    assert both and both.p_value == 1.0
    # three tasks that gain: no resample is at 0 or below, so the smallest that 2,000 can tell
    gain = combined([[by_task(1.0, 2.0, 3.0)], [by_task(0.0, 0.0, 0.0)]], [1.0, -1.0])
    assert gain and gain.p_value == pytest.approx(2 / 2001) and gain.interval.low == 1.0
    single = combined([[by_task(1.0)], [by_task(0.0)]], [1.0, -1.0])
    assert single and single.p_value is None and single.interval == Interval(1.0)


# ---------------------------------------------------------------- equal budgets, and what it takes to reach the best


def spent(*amounts: float) -> dict[int, dict[Unit, float]]:
    """Return what a run had spent at the steps 0, 10, 20, ...; seconds are ten times as many."""
    return {
        10 * i: {"steps": 10.0 * i, "rollouts": 80.0 * i, "tokens": a, "seconds": 10 * a} for i, a in enumerate(amounts)
    }


def curve(*values: float) -> dict[int, Parts]:
    return {10 * i: by_task(value, value) for i, value in enumerate(values)}


def test_what_a_run_spent_adds_up_over_its_steps() -> None:
    row = {"rollouts": 64, "rollout_seconds": 3.0, "train_seconds": 1.0, "tokens_per_second": 250.0}
    assert spent_by_step([{"step": 0, **row}, {"step": 1, **row, "tokens_per_second": None}]) == {
        0: {"steps": 0, "rollouts": 0, "tokens": 0, "seconds": 0},
        1: {"steps": 1, "rollouts": 64, "tokens": 1000, "seconds": 4},
        2: {"steps": 2, "rollouts": 128, "tokens": 1000, "seconds": 8},
    }


def test_arms_are_compared_where_all_have_spent_the_same() -> None:
    curves = {"grpo": [curve(0.0, 0.2, 0.4), curve(0.0, 0.4, 0.4)], "echo": [curve(0.0, 0.8, 1.0)] * 2}
    # grpo is cheap: 100 tokens in 10 steps, 200 in 20; echo takes 200 and 400. All have spent 200.
    costs = {"grpo": [spent(0, 100, 200), spent(0, 50, 200)], "echo": [spent(0, 200, 400), spent(0, 100, 400)]}
    found = {row.arm: row for row in at_equal("pass@1", curves, costs, "tokens")}
    assert found["grpo"] == AtEqual("grpo", "pass@1", "tokens", 200, Interval(0.4, 0.4, 0.4), None)
    # echo: 0.8 in seed 0, and in seed 1 a third of the way from 0.8 to 1
    against = found["echo"].against_first
    assert found["echo"].value and found["echo"].value.value == pytest.approx((0.8 + 0.8 + 0.2 / 3) / 2)
    assert against and against.value == pytest.approx((0.8 + 0.8 + 0.2 / 3) / 2 - 0.4)
    assert (against.low, against.high) == (pytest.approx(0.4), pytest.approx(0.4 + 0.2 / 3))  # one seed, or the other
    by_rollouts = {row.arm: row for row in at_equal("pass@1", curves, costs, "rollouts")}
    assert by_rollouts["echo"].amount == 160 and by_rollouts["echo"].value == Interval(1.0, 1.0, 1.0)


def test_what_it_takes_to_reach_the_best_of_the_control_with_censoring() -> None:
    curves: Mapping[str, Sequence[Mapping[int, Any]]] = {
        "grpo": [curve(0.0, 0.1, 0.3, 0.5), curve(0.9, 0.5, 0.2, 0.1), curve(0.0, 0.1, 0.2, 0.4)],
        "echo": [curve(0.0, 0.5, 0.1, 0.1), curve(0.9, 0.4, 0.4, 0.4), curve(0.0, 0.1, 0.4, 0.9)],
    }
    costs = {arm: [spent(0, 100, 200, 300)] * 3 for arm in curves}
    grpo, echo = reached("pass@1", curves, costs, "steps")
    assert grpo.best == echo.best == (0.5, 0.5, 0.4)  # the start of seed 1 is not counted
    assert grpo.amounts == (30, 10, 30) and grpo.speedup == Interval(1.0, 1.0, 1.0)
    assert echo.amounts == (10, None, 20) and echo.ended == (30, 30, 30)
    # speed-ups 3, 0 (censored) and 1.5; the median of three draws is 0 or 3 with probability 7/27 each
    assert echo.speedup == Interval(1.5, 0.0, 3.0)
    assert reached("pass@1", curves, costs, "seconds")[1].amounts == (1000, None, 2000)
    assert reached("pass@1", {"grpo": [{0: by_task(1.0)}]}, {"grpo": [spent(0)]}, "steps") == []
    untold = {arm: [spent(0, 0, 0, 0)] * 3 for arm in curves}  # metrics without tokens_per_second
    assert reached("pass@1", curves, untold, "tokens") == []
    assert reached("pass@1", curves, untold, "steps") == [grpo, echo]
