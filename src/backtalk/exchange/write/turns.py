"""Split a trajectory into turns for the writers: messages by turn, the name of the rollout, where branches begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backtalk.errors import DataError
from backtalk.messages import ToolCall
from backtalk.trajectory import Trajectory

CallsOf = Callable[[Sequence[int]], Sequence[ToolCall]]  # reads an action's tool calls from its token ids


def rollout_name(trajectory: Trajectory) -> str:
    """Return a name of the rollout that no other rollout of a run has."""
    return f"{trajectory.task_id}/{trajectory.sample_index}/{trajectory.policy_version}"


def branch_starts(trajectory: Trajectory) -> dict[int, int]:
    """Return the position of each branch's first token."""
    return {segment.branch: start for start, _, segment in reversed([*trajectory.spans()])}


def messages_by_turn(trajectory: Trajectory) -> list[list[Mapping[str, Any]]]:
    """Return the messages of the prompt, then those of each turn: the assistant's and what answers it."""
    turns: list[list[Mapping[str, Any]]] = [[]]
    for message in trajectory.messages:
        if message.get("role") == "assistant":
            turns.append([])
        turns[-1].append(message)
    return turns


def check_one_message_an_action(trajectory: Trajectory, turns: Sequence[Any]) -> None:
    """Raise DataError unless there are as many actions as ``turns`` with a message of the assistant."""
    if len(trajectory.actions) != len(turns):
        raise DataError(
            f"{rollout_name(trajectory)} has {len(trajectory.actions)} actions and {len(turns)} messages of the "
            "assistant, so which action said what cannot be told; export trajectories that keep all their messages"
        )
