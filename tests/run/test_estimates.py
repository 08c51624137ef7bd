"""Estimates and their intervals against numbers worked out by hand, published tables and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from backtalk.run.estimates import (
    Interval,
    difference_interval,
    interval_text,
    mean_interval,
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
    before = draw.normal(5.0, 2.0, size=50)
    rows = [(b - 0.5 + e, 1.0, b, 1.0) for b, e in zip(before, draw.normal(0, 0.1, size=50), strict=True)]
    paired = difference_interval(rows)
    alone = ratio_interval([(b, 1.0) for b in before])
    assert paired and alone and paired.low is not None and paired.high is not None
    assert alone.low is not None and alone.high is not None
    assert paired.low < -0.5 < paired.high < -0.4
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_students_interval_by_hand() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])  # sd 1, error 1/sqrt(3), t(2) = 4.303
    assert interval and interval.low is not None and interval.high is not None
    assert interval.value == 2.0
    assert interval.high - interval.value == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert interval.value - interval.low == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    single = mean_interval([1.0])
    assert single and (single.value, single.low) == (1.0, None)
    assert mean_interval([1.0, None]) is None
    assert mean_interval([]) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (30, 2.042), (31, 2.040), (40, 2.021), (120, 1.980)])
def test_students_quantiles_are_the_published_ones(freedom: int, quantile: float) -> None:
    """NIST/SEMATECH e-Handbook, 1.3.6.7.2, column 0.975."""
    values = [float(i) for i in range(freedom + 1)]
    interval = mean_interval(values)
    assert interval and interval.high is not None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert (interval.high - interval.value) / error == pytest.approx(quantile, abs=5e-4)


def test_intervals_as_text() -> None:
    assert interval_text(Interval(0.25, 0.125, 0.375)) == "0.250 [0.125, 0.375]"
    assert interval_text(Interval(0.25)) == "0.250"
    assert interval_text(Interval.from_dict(None)) == "-"
    stored = {"value": 0.25, "low": 0.125, "high": 0.5}
    assert interval_text(Interval.from_dict(stored), "{:+.1%}") == "+25.0% [+12.5%, +50.0%]"
