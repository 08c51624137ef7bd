"""RFC 010 at the edge: what is kept exactly, what is lost, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backtalk.errors import DataError
from backtalk.exchange.rfc010 import from_rfc010, to_rfc010
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole

TRAJECTORY = Trajectory(
    task_id="t",
    sample_index=3,
    policy_version=7,
    segments=(
        Segment(CONTEXT, (1, 2)),
        Segment(TEMPLATE, (3,)),
        Segment(ACTION, (4, 5), (-0.5, -0.25), turn=0),
        Segment(TEMPLATE, (6,), turn=0, tool="bash"),
        Segment(WARNING, (7,), turn=0, tool="bash"),
        Segment(ENV, (8, 9), turn=0, tool="bash"),
        Segment(CONTEXT, (1,), branch=1),
        Segment(ACTION, (10,), (-1.5,), turn=1, branch=1),
    ),
    messages=({"role": "user", "content": "x"},),
    reward=0.5,
    stats={"num_turns": 2.0},
)


def test_every_column_is_as_the_rfc_says() -> None:
    record = to_rfc010(TRAJECTORY)
    assert record["token_ids"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 10]
    c, a, e, w = "context", "action", "env_output", "warning"
    assert record["roles"] == [c, c, c, a, a, c, w, e, e, c, a]
    bits = {name: [int(x) for x in record[name]] for name in ("action_mask", "obs_mask", "warning_mask")}
    assert bits == {
        "action_mask": [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1],
        "obs_mask": [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        "warning_mask": [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    }
    assert record["logprobs"] == [None, None, None, -0.5, -0.25, None, None, None, None, None, -1.5]
    assert (record["reward"], record["world_loss_target"]) == (0.5, "env_only")
    everything = to_rfc010(TRAJECTORY, "all")
    assert [int(x) for x in everything["obs_mask"]] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("target", ["env_only", "all"])
def test_nothing_is_lost(target: Any) -> None:
    record = json.loads(json.dumps(to_rfc010(TRAJECTORY, target), allow_nan=False))
    assert from_rfc010(record) == TRAJECTORY
    for part in record["metadata"]["segments"]:  # written before segments had roles
        del part["role"]
    assert [s.role for s in from_rfc010(record).segments] == [
        CONTEXT if s.role is TEMPLATE else s.role for s in TRAJECTORY.segments
    ]


def test_without_metadata_turns_are_found_from_the_masks() -> None:
    record = to_rfc010(TRAJECTORY)
    del record["metadata"]
    found = from_rfc010(record, task_id="other", sample_index=1)
    assert (found.task_id, found.sample_index, found.reward) == ("other", 1, 0.5)
    assert [(s.role, s.token_ids, s.turn) for s in found.segments] == [
        (CONTEXT, (1, 2, 3), None),
        (ACTION, (4, 5), 0),
        (CONTEXT, (6,), 0),
        (WARNING, (7,), 0),
        (ENV, (8, 9), 0),
        (CONTEXT, (1,), 0),
        (ACTION, (10,), 1),
    ]
    again = to_rfc010(found)
    for column in ("token_ids", "roles", "action_mask", "obs_mask", "warning_mask", "logprobs"):
        assert again[column] == record[column]


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    segments: list[Segment] = []
    branch = 0
    for _ in range(draw(st.integers(0, 8))):
        role = draw(st.sampled_from(TokenRole))
        ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)))
        turn = draw(st.integers(0, 3)) if role is ACTION else draw(st.none() | st.integers(0, 3))
        logprobs = None
        if role is ACTION:
            floats = st.floats(allow_nan=False, allow_infinity=False)
            logprobs = draw(st.none() | st.tuples(*(floats for _ in ids)))
        branch += draw(st.integers(0, 1)) if segments else 0
        segments.append(Segment(role, ids, logprobs, turn, draw(st.none() | st.text(max_size=3)), branch))
    return Trajectory(task_id="t", sample_index=0, segments=tuple(segments))


@settings(deadline=None)
@given(trajectories(), st.sampled_from(["env_only", "all"]))
def test_the_way_there_and_back_keeps_ids_logprobs_and_masks(trajectory: Trajectory, target: Any) -> None:
    record = to_rfc010(trajectory, target)
    back = from_rfc010(json.loads(json.dumps(record)))
    assert to_rfc010(back, target) == record
    assert back.logprobs == trajectory.logprobs
    assert back == trajectory


def test_a_failure_is_kept() -> None:
    failed = replace(
        TRAJECTORY, reward=None, stop_reason=StopReason.FAILED, failure=Failure("step", "SandboxError", "gone")
    )
    assert from_rfc010(to_rfc010(failed)).failure == failed.failure


def test_actions_without_logprobs_are_unsampled() -> None:
    record = {"input_ids": [1, 2], "action_mask": [0, 1], "obs_mask": [0, 0], "warning_mask": [0, 0]}
    (first, second) = from_rfc010(record).segments
    assert (first.role, first.turn) == (CONTEXT, None)
    assert (second.role, second.turn, second.logprobs) == (ACTION, 0, None)
    # Of one action, some tokens may have been sampled and others not.
    record = {**record, "action_mask": [1, 1], "logprobs": [-0.5, None]}
    segments = from_rfc010(record).segments
    assert [(s.role, s.turn, s.logprobs) for s in segments] == [(ACTION, 0, (-0.5,)), (ACTION, 0, None)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_mask": [1] * 10}, "action_mask has 10 entries for 11 tokens"),
        ({"obs_mask": None}, "no 'obs_mask'"),
        ({"obs_mask": [0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0]}, "token 3 is in action_mask and in obs_mask"),
        ({"obs_mask": [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]}, "token 6 is in obs_mask .*'env_only'"),
        ({"world_loss_target": "all"}, "token 6 is not in obs_mask .*'all'"),
        ({"world_loss_target": "warning_only"}, "'env_only', or 'all'"),
        ({"warning_mask": [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]}, r"warning_mask\[6\] is 2"),
        ({"roles": ["context"] * 11}, "token 3 has role 'context' and is 'action' by the masks"),
        ({"roles": ["context"]}, "roles has 1 entries for 11 tokens"),
        ({"logprobs": [0.0]}, "logprobs has 1 entries for 11 tokens"),
        ({"logprobs": [None] * 11}, r"logprobs\[3\] is None"),
        ({"logprobs": [float("nan")] * 11}, r"logprobs\[3\] is nan"),
        ({"reward": float("nan")}, "reward=nan"),
        ({"token_ids": [-1] * 11}, r"token_ids\[0\] is -1"),
        ({"token_ids": "abcdefghijk"}, "token_ids is str, not a list"),
        ({"token_ids": None}, "'token_ids' or 'input_ids'"),
        ({"metadata": {"segments": [{"length": 11}]}}, "does not fit the masks at tokens 0 to 11"),
        ({"metadata": {"segments": [{"length": 2}]}}, "covers 2 of 11 tokens"),
    ],
)
def test_records_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_rfc010({**to_rfc010(TRAJECTORY), **change})
    with pytest.raises(DataError, match="'env_only', or 'all'"):
        to_rfc010(TRAJECTORY, "full")  # pyright: ignore[reportArgumentType]
