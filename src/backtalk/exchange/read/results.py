"""Read the rows that verifiers saves (``results.jsonl`` and its data sets): prompt and completion as messages or text.

Read against verifiers 0.1 to 0.4. Calls are JSON text in them, and the answers of tools name no tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, mapping, parsed, required
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages
from backtalk.exchange.read.spellings import chat_messages
from backtalk.trajectory import Failure, StopReason

_STOPS = {"max_turns_reached": StopReason.MAX_TURNS, "prompt_too_long": StopReason.MAX_TOKENS}


def read_result(record: Mapping[str, Any], name: str) -> Conversation:
    """Return the conversation of one row. A row with an error has no reward: verifiers writes 0 there.

    Raises:
        DataError: no prompt or completion, or a message that cannot be read.
    """
    prompt = _listed(required(record, "a result", "prompt"), "user", "prompt")
    completion = _listed(required(record, "a result", "completion"), "assistant", "completion")
    about = about_of(record, {}, name)
    if record.get("example_id") is not None:
        task = first_of(record, "env_id", "task")
        about = replace(about, task_id=f"{task}/{record['example_id']}" if task else str(record["example_id"]))
    error = record.get("error")
    if error:
        told = error if isinstance(error, Mapping) else {"error": str(error)}
        said = str(first_of(told, "error_chain_str", "error_chain_repr", "error"))
        about = replace(about, failure=Failure("step", str(told.get("error")), said))
    stop = _STOPS.get(str(record.get("stop_condition")))
    stop = StopReason.MAX_TOKENS if stop is None and record.get("is_truncated") else stop
    about = replace(about, stop_reason=stop or about.stop_reason, messages=kept_messages([*prompt, *completion]))
    return Conversation(messages=chat_messages([*prompt, *completion]), about=about)


def _listed(value: Any, role: str, what: str) -> list[Any]:
    """Return messages; a text, which an environment of completions has, as one message of ``role``."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return [{"role": role, "content": value}]
        value = parsed(value, what)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{what} is a {type(value).__name__}, not a text or a list of messages")
    return [
        mapping(parsed(message, f"message {i} of {what}"), f"message {i} of {what}") for i, message in enumerate(value)
    ]
