"""The form that every format of messages is read into: the messages, and the facts beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backtalk.exchange.plain import first_of, reward_of
from backtalk.exchange.read.spellings import ChatMessage
from backtalk.exchange.read.turns import About
from backtalk.exchange.read.wrappers import Wrappers
from backtalk.messages import ToolSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A recorded conversation. With ``wrappers`` None the harness is found by its phrases in the messages."""

    messages: Sequence[ChatMessage]
    about: About
    wrappers: Wrappers | None = None
    tools: tuple[ToolSpec, ...] | None = None  # None: those that the record lists in OpenAI's format


def about_of(outer: Any, inner: Any, name: str) -> About:
    """Return a record's facts beside its tokens; ``inner`` is the document inside it, or the record itself.

    Raises:
        DataError: a reward that is not a finite number.
    """
    if not isinstance(outer, Mapping):
        return About(task_id=name)
    task = first_of(outer, "task_id", "task_name", "task", "scenario")
    task = first_of(task, "key", "task_id", "id", "name", "path", "type") if isinstance(task, Mapping) else task
    task = first_of(outer, "instance_id", "episode_id", "trajectory_id", "session_id", "id") if task is None else task
    if outer.get("scenario") is not None and outer.get("task_idx") is not None:
        task = f"{outer['scenario']}/{outer['task_idx']}"
    messages = first_of(inner, "messages", "steps") or ()
    kept = tuple(dict(m) for m in messages if isinstance(m, Mapping)) if isinstance(messages, (list, tuple)) else ()
    reward = None if "rewards" in outer else reward_of(outer)
    return About(task_id=name if task is None else str(task), reward=reward, messages=kept)


def run_name(place: str) -> str:
    """Return the task of a run that has a file of its own, which is named after it; other places as they are."""
    return re.sub(r"\.traj(?:\.json)?(?:\.gz)?\Z", "", Path(place).name) if ".traj" in Path(place).name else place


def kept_messages(messages: Any) -> tuple[dict[str, Any], ...]:
    """Return messages as they were recorded, for the trajectory to keep."""
    return tuple(dict(message) for message in messages if isinstance(message, Mapping))
