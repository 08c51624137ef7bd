"""Read trajectories of SWE-agent (``.traj``) and mini-swe-agent (``.traj.json``): messages, and a status at the end.

Read against SWE-agent 1.1, whose demonstrations are given text, and mini-swe-agent 2, formats mini-swe-agent-1 and
-1.1, whose chat ends with a message of role ``exit``. Neither has a reward; the exit status says why a run stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, mapping, parsed, required
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages, run_name
from backtalk.exchange.read.spellings import ChatMessage, chat_messages
from backtalk.exchange.read.turns import About
from backtalk.exchange.read.wrappers import MINI_SWE_AGENT, SWE_AGENT
from backtalk.trajectory import Failure, StopReason

_STOPS = {
    "Submitted": StopReason.SUBMITTED,
    "LimitsExceeded": StopReason.MAX_TURNS,
    "TimeExceeded": StopReason.DEADLINE,
    "RepeatedFormatError": StopReason.ENV_DONE,
    "": StopReason.SUBMITTED,
}


def read_swe_agent(record: Mapping[str, Any], name: str) -> Conversation:
    """Return the conversation of one run, from ``history``, or from the steps where a data set left that out.

    Raises:
        DataError: neither is there, or a message cannot be read.
    """
    history = parsed(record.get("history"), "history")
    messages = _history(history) if history else _steps(parsed(record.get("trajectory"), "trajectory"))
    info = mapping(parsed(record.get("info"), "info") or {}, "info")
    status = str(info.get("exit_status") or "submitted")
    about = replace(about_of(record, {}, run_name(name)), messages=kept_messages(history or ()))
    if status.startswith("submitted"):
        stop = StopReason.SUBMITTED
    elif status in ("exit_context", "exit_cost", "exit_total_cost", "exit_instance_cost", "exit_instance_call_limit"):
        stop = StopReason.MAX_TOKENS
    elif status.startswith("exit_format") or status in ("exit_forfeit", "exit_command"):
        stop = StopReason.ENV_DONE
    elif "time" in status:
        stop = StopReason.DEADLINE
    else:
        about, stop = replace(about, failure=Failure("step", status, status)), StopReason.FAILED
    return Conversation(messages=messages, about=replace(about, stop_reason=stop), wrappers=SWE_AGENT)


def _history(raw: Any) -> list[ChatMessage]:
    """Return the main agent's messages; demonstrations stand in the prompt, as one text."""
    entries = [mapping(entry, f"message {i}") for i, entry in enumerate(raw)]
    shown = [entry for entry in entries if not entry.get("is_demo")]
    found = chat_messages(shown)
    if len(found) != len(shown):
        raise DataError("history holds several tools' results in one message, which cannot be told apart here")
    found = [
        replace(message, observed=message.role != "assistant" and entry.get("message_type") == "observation")
        for message, entry in zip(found, shown, strict=True)
    ]
    demos = [entry for entry in entries if entry.get("is_demo")]
    if not demos:
        return found
    text = "\n".join(f"{message.role}: {message.text}" for message in chat_messages(demos))
    start = 1 if found and found[0].role == "system" else 0
    return [*found[:start], ChatMessage(role="user", text=text), *found[start:]]


def _steps(raw: Any) -> list[ChatMessage]:
    """Return steps as messages: the query of the first is the prompt, each has a response and an observation."""
    if not isinstance(raw, (list, tuple)) or not raw:
        raise DataError("a run of SWE-agent has a history of messages or a trajectory of steps, this one neither")
    steps = [mapping(step, f"step {i}") for i, step in enumerate(raw)]
    found = chat_messages(steps[0].get("query") or (), "the query of step 0")
    for i, step in enumerate(steps):
        raw_message = {"role": "assistant", "content": step.get("response"), "tool_calls": step.get("tool_calls")}
        found += [replace(m, given=False) for m in chat_messages([raw_message], f"step {i}")]
        found.append(ChatMessage(role="user", text=str(step.get("observation") or ""), observed=True))
    return found


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
