"""Estimates and their intervals against numbers worked out by hand, published tables and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest

from backtalk.run.estimates import (
    Interval,
    Parts,
    combined_interval,
    interval_text,
    pass_at_k,
    ratio_interval,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 0, 1, 0.0),
        (4, 4, 4, 1.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 9 / 10),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (10, 3, 8, 1.0),  # only 7 attempts failed, so any 8 hold a solved one
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_solved_attempt() -> None:
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= solved"):
        pass_at_k(n, c, k)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """200 samples of 40 from a known distribution: 95 % intervals miss the mean about 5 % of the time."""
    draw = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        interval = ratio_interval([(float(x), 1.0) for x in draw.exponential(size=40)], seed=seed)
        assert interval and interval.low is not None and interval.high is not None
        inside += interval.low <= 1.0 <= interval.high
    assert 0.88 <= inside / 200 <= 0.98


def test_a_ratio_weighs_tasks_by_their_tokens() -> None:
    interval = ratio_interval([(10.0, 10.0), (90.0, 30.0)])
    assert interval is not None
    assert interval.value == 2.5  # 100 / 40, not the mean of 1 and 3
    assert interval.low == 1.0 and interval.high == 3.0


def test_too_little_has_no_interval() -> None:
    assert ratio_interval([]) is None
    assert ratio_interval([(0.0, 0.0), (0.0, 0.0)]) is None
    single = ratio_interval([(3.0, 2.0)])
    assert single and (single.value, single.low, single.high) == (1.5, None, None)


def test_a_paired_difference_is_narrower_than_the_two_apart() -> None:
    draw = np.random.default_rng(0)
    before = by_task(draw.normal(5.0, 2.0, size=50))
    after = {task: (a - 0.5 + draw.normal(0, 0.1), b) for task, (a, b) in before.items()}
    paired = combined_interval([[after], [before]], [1.0, -1.0])
    alone = combined_interval([[before]], [1.0])
    assert paired and alone and paired.low is not None and paired.high is not None
    assert alone.low is not None and alone.high is not None
    assert paired.low < -0.5 < paired.high < -0.4
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def by_task(values: Iterable[float]) -> Parts:
    return {str(i): (float(value), 1.0) for i, value in enumerate(values)}


def test_without_differences_between_tasks_the_interval_is_over_the_seeds() -> None:
    """Two seeds draw each twice with probability 1/4, so a 95 % interval reaches from one to the other."""
    interval = combined_interval([[by_task([0.25] * 8), by_task([0.75] * 8)]], [1.0])
    assert interval == Interval(0.5, 0.25, 0.75)


def test_two_seeds_that_agree_are_no_more_tasks_than_one() -> None:
    """What is hard about a task is so for every seed: a copy of a seed says nothing new."""
    seed = by_task([0.0, 0.0, 0.5, 1.0, 0.25, 0.75, 0.0, 1.0])
    one, two = (combined_interval([[seed] * count], [1.0]) for count in (1, 2))
    assert one == two and one is not None and one.low is not None and one.low < one.value


def test_variances_of_seeds_and_tasks_add_up() -> None:
    """Of u_s + v_t the bootstrap's variance is var(u) / S + var(v) / T, with the variances of what was drawn."""
    draw = np.random.default_rng(3)
    seeds, tasks = draw.normal(size=40), 2 * draw.normal(size=60)
    interval = combined_interval([[by_task(tasks + seed) for seed in seeds]], [1.0])
    assert interval and interval.low is not None and interval.high is not None
    assert interval.value == pytest.approx(seeds.mean() + tasks.mean())
    error = math.sqrt(seeds.var() / 40 + tasks.var() / 60)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_each_seed_weighs_the_same_whatever_its_tokens() -> None:
    interval = combined_interval([[{"a": (10.0, 10.0)}, {"a": (300.0, 100.0)}]], [1.0])
    assert interval and interval.value == 2.0  # of 1 and 3, not 310 / 110


def test_pairs_are_those_that_every_evaluation_has() -> None:
    after = [{"a": (3.0, 1.0), "b": (5.0, 1.0)}, {"a": (4.0, 1.0)}]
    before = [{"a": (1.0, 1.0)}, {"a": (1.0, 1.0), "b": (9.0, 1.0)}]
    interval = combined_interval([after, before], [1.0, -1.0])
    assert interval and interval.value == 2.5  # task a alone: 2 and 3
    assert combined_interval([after, [{"b": (1.0, 1.0)}, {"b": (1.0, 1.0)}]], [1.0, -1.0]) is None  # seed 1 has no pair


def test_a_weighted_sum_of_three_evaluations_by_hand() -> None:
    points = [[{"a": (value, 2.0)}] for value in (1.0, 4.0, 6.0)]
    assert combined_interval(points, [0.25, 0.5, 0.25]) == Interval(0.125 + 1.0 + 0.75)  # one task, so no bounds


def test_intervals_as_text() -> None:
    assert interval_text(Interval(0.25, 0.125, 0.375)) == "0.250 [0.125, 0.375]"
    assert interval_text(Interval(0.25)) == "0.250"
    assert interval_text(Interval.from_dict(None)) == "-"
    stored = {"value": 0.25, "low": 0.125, "high": 0.5}
    assert interval_text(Interval.from_dict(stored), "{:+.1%}") == "+25.0% [+12.5%, +50.0%]"
