"""The record checks itself; its properties are compared with numbers counted by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

SEGMENTS = (
    Segment(TokenRole.TEMPLATE, (1,)),
    Segment(TokenRole.CONTEXT, (10, 11)),
    Segment(TokenRole.ACTION, (20, 21), (-0.5, -0.25), turn=0),
    Segment(TokenRole.TEMPLATE, (2,), turn=0, tool="bash"),
    Segment(TokenRole.ENV_OUTPUT, (30, 31, 32), turn=0, tool="bash"),
    Segment(TokenRole.WARNING, (40,), turn=0, tool="bash"),
    Segment(TokenRole.ACTION, (22,), (-1.0,), turn=1),
)


def trajectory(**changes: object) -> Trajectory:
    return Trajectory(**{"task_id": "a", "sample_index": 0, "segments": SEGMENTS, **changes})  # type: ignore[arg-type]


def test_flat_views_line_up() -> None:
    t = trajectory()
    assert t.token_ids == (1, 10, 11, 20, 21, 2, 30, 31, 32, 40, 22)
    assert [int(role) for role in t.roles] == [1, 0, 0, 2, 2, 1, 3, 3, 3, 4, 2]
    assert t.logprobs == (None, None, None, -0.5, -0.25, *[None] * 5, -1.0)
    assert len(t) == 11
    assert t.num_turns == 2
    assert {role.name: t.count(role) for role in TokenRole} == {
        "CONTEXT": 2,
        "TEMPLATE": 2,
        "ACTION": 3,
        "ENV_OUTPUT": 3,
        "WARNING": 1,
    }
    assert [(start, end) for start, end, _ in t.spans()] == [
        (0, 1),
        (1, 3),
        (3, 5),
        (5, 6),
        (6, 9),
        (9, 10),
        (10, 11),
    ]


def test_an_action_that_nobody_sampled_is_an_action() -> None:
    t = trajectory(
        segments=(*SEGMENTS, Segment(TokenRole.ACTION, (23, 24), turn=2), Segment(TokenRole.ACTION, (), turn=3))
    )
    assert (t.count(TokenRole.ACTION), t.num_turns, t.num_unsampled_turns) == (5, 4, 2)
    assert t.logprobs[-3:] == (-1.0, None, None)
    assert [[s.is_sampled for s in action] for action in t.actions] == [[True], [True], [False], [False]]
    # A turn may be written in parts, of which some were sampled.
    forced = Segment(TokenRole.ACTION, (25,), turn=1)
    parts = trajectory(segments=(*SEGMENTS, forced))
    assert (parts.num_turns, parts.num_unsampled_turns, parts.actions[1]) == (2, 0, (SEGMENTS[-1], forced))


@given(st.lists(st.tuples(st.sampled_from(list(TokenRole)), st.lists(st.integers(0, 9), max_size=4)), max_size=8))
@settings(deadline=None)
def test_spans_partition_the_tokens(runs: list[tuple[TokenRole, list[int]]]) -> None:
    segments = [
        Segment(r, tuple(ids), (-1.0,) * len(ids) if r is TokenRole.ACTION else None, turn=0) for r, ids in runs
    ]
    t = trajectory(segments=tuple(segments))
    assert len(t.token_ids) == len(t.roles) == len(t.logprobs) == len(t) == sum(t.count(role) for role in TokenRole)
    for start, end, segment in t.spans():
        assert t.token_ids[start:end] == segment.token_ids
        assert set(t.roles[start:end]) <= {segment.role}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TokenRole.ACTION, (1, 2), (-0.1,), 0), "ACTION segment of 2 tokens needs 2 logprobs, got 1"),
        ((TokenRole.ACTION, (1,), (), 0), "ACTION segment of 1 tokens needs 1 logprobs, got 0; .* logprobs=None"),
        ((TokenRole.ACTION, (1,), (math.nan,), 0), "not finite"),
        ((TokenRole.ACTION, (1,), (-math.inf,), 0), "not finite"),
        ((TokenRole.ACTION, (1,), (-0.1,)), "turn=None"),
        ((TokenRole.ENV_OUTPUT, (1,), (-0.1,)), "ENV_OUTPUT segment was not sampled"),
        ((TokenRole.CONTEXT, (-100,)), "negative token id"),
    ],
)
def test_a_segment_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": math.nan}, "not finite"),
        ({"reward": math.inf}, "not finite"),
        ({"stop_reason": StopReason.FAILED}, "a failed rollout says why"),
        ({"failure": Failure("step", "SandboxError", "died")}, "only a failed one does"),
        (
            {"stop_reason": StopReason.FAILED, "failure": Failure("step", "SandboxError", "died"), "reward": 0.0},
            "an infrastructure failure is not a score of 0",
        ),
    ],
)
def test_a_trajectory_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory(**changes)


def test_a_group_holds_attempts_of_one_task_and_one_policy() -> None:
    group = TrajectoryGroup("a", (trajectory(reward=1.0), trajectory(sample_index=1)))
    assert group.rewards == (1.0, None)
    assert len(group) == len(list(group)) == 2
    assert group.policy_version == 0
    with pytest.raises(ValueError, match=r"mixes policy versions \[0, 3\]"):
        TrajectoryGroup("a", (trajectory(), trajectory(policy_version=3)))
    with pytest.raises(ValueError, match=r"trajectories of \['b'\]"):
        TrajectoryGroup("a", (trajectory(), trajectory(task_id="b")))
    with pytest.raises(ValueError, match="no trajectory"):
        TrajectoryGroup("a", ())


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory().reward = 1.0  # type: ignore[misc]
