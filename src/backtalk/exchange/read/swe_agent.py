"""Read trajectories of SWE-agent (``.traj``): its history of messages, demonstrations as given text.

Read against SWE-agent 1.1. It has no reward; its exit status is the stop reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import mapping, parsed
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages, run_name
from backtalk.exchange.read.spellings import ChatMessage, chat_messages
from backtalk.exchange.read.wrappers import SWE_AGENT
from backtalk.trajectory import Failure, StopReason


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
