"""Group-relative advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backtalk.errors import ConfigError
from backtalk.objective.advantages import group_advantages

rewards = st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), max_size=8)


def test_one_success_in_four() -> None:
    # mean 1/4, squared deviations 9/16 + 3 * 1/16 = 12/16, sample variance 1/4, deviation 1/2
    assert group_advantages([1, 0, 0, 0], eps=0) == [1.5, -0.5, -0.5, -0.5]


def test_without_spread_the_deviation_stays() -> None:
    assert group_advantages([3, 1], estimator="dr_grpo") == [1.0, -1.0]


def test_a_missing_reward_moves_neither_mean_nor_spread() -> None:
    with_failure = group_advantages([1, None, 0, 0, None, 0], eps=0)
    assert with_failure == [1.5, 0.0, -0.5, -0.5, 0.0, -0.5]


@pytest.mark.parametrize("group", [[], [None, None], [0.7], [0.1] * 3, [0.1, None, 0.1]])
def test_nothing_to_compare_gives_exact_zeros(group: list[float | None]) -> None:
    assert group_advantages(group) == [0.0] * len(group)


@given(rewards)
@settings(deadline=None)
def test_advantages_sum_to_zero_and_keep_the_order(group: list[float | None]) -> None:
    advantages = group_advantages(group)
    assert len(advantages) == len(group)
    assert abs(math.fsum(advantages)) < 1e-6 * max(1.0, max(map(abs, advantages), default=0.0))
    known = [(r, a) for r, a in zip(group, advantages, strict=True) if r is not None]
    assert [a for _, a in sorted(known)] == sorted(a for _, a in known)
    assert all(a == 0 for r, a in zip(group, advantages, strict=True) if r is None)


def test_leave_one_out_compares_with_the_others() -> None:
    assert group_advantages([1, 0, 0, 0], estimator="rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantages([4, None, 1, 1], estimator="rloo") == [3.0, 0.0, -1.5, -1.5]  # 4 - (1 + 1) / 2
    assert group_advantages([1], estimator="rloo") == [0.0]


def test_what_is_no_baseline_is_refused() -> None:
    with pytest.raises(ConfigError, match="dr_grpo"):
        group_advantages([1, 0], estimator="gae")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not all finite"):
        group_advantages([1, float("nan")])
