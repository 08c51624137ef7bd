"""Read trajectories of mini-swe-agent (``.traj.json``): chat that ends with a message of role ``exit``.

Read against mini-swe-agent 2, formats mini-swe-agent-1 and -1.1. It has no reward; its exit status says why it
stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backtalk.exchange.plain import first_of, mapping, required
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages, run_name
from backtalk.exchange.read.spellings import chat_messages
from backtalk.exchange.read.turns import About
from backtalk.exchange.read.wrappers import MINI_SWE_AGENT
from backtalk.trajectory import Failure, StopReason

_STOPS = {
    "Submitted": StopReason.SUBMITTED,
    "LimitsExceeded": StopReason.MAX_TURNS,
    "TimeExceeded": StopReason.DEADLINE,
    "RepeatedFormatError": StopReason.ENV_DONE,
    "": StopReason.SUBMITTED,
}


def read_mini_swe_agent(record: Mapping[str, Any], name: str) -> Conversation:
    """Return the conversation of one run, without the harness's own ``exit`` message.

    Raises:
        DataError: no messages, or one that cannot be read.
    """
    raw = [mapping(m, f"message {i}") for i, m in enumerate(required(record, "a mini-swe-agent run", "messages"))]
    said = [message for message in raw if message.get("role") != "exit"]
    ends = [mapping(m.get("extra") or {}, "the extra of exit") for m in raw if m.get("role") == "exit"]
    info = mapping(record.get("info") or {}, "info")
    status = str(first_of(ends[-1] if ends else {}, "exit_status") or first_of(info, "exit_status") or "")
    about = replace(about_of(record, {}, run_name(name)), messages=kept_messages(said))
    messages = chat_messages(said)
    if not any(message.role == "tool" for message in messages):
        first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
        messages = [replace(m, observed=i > first and m.role == "user") for i, m in enumerate(messages)]
    return Conversation(messages=messages, about=_ended(about, status, ends[-1:]), wrappers=MINI_SWE_AGENT)


def _ended(about: About, status: str, ends: list[Mapping[str, Any]]) -> About:
    if status in _STOPS:
        return replace(about, stop_reason=_STOPS[status])
    why = str(first_of(ends[0], "exception_str") or status) if ends else status
    return replace(about, failure=Failure("step", status, why))
