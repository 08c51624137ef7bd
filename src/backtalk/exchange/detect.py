"""Name the formats of trajectory records, and detect a record's format by the fields that only it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backtalk.errors import DataError
from backtalk.exchange.logged import LISTS, are_steps, request_of

Format = Literal[
    "chat",
    "atif",
    "harbor",
    "turns",
    "trl",
    "verifiers",
    "openenv",
    "rfc010",
    "mini-swe-agent",
    "swe-agent",
    "inspect",
    "openhands",
    "skyrl",
    "rllm",
]


def guess_format(record: Any) -> Format:
    """Return the format of a record.

    Raises:
        DataError: it looks like none of them.
    """
    if isinstance(record, (list, tuple)):
        first = record[0] if record else None
        if is_event(first):
            return "openhands"
        is_said = isinstance(first, Mapping) and ({"role"} <= set(first) or {"from", "value"} <= set(first))
        return "chat" if is_said or (isinstance(first, Mapping) and "type" in first) else "turns"
    if not isinstance(record, Mapping):
        raise DataError(f"got {type(record).__name__}, and a record is an object or a list; is this the right file?")
    fields = {name for name, value in record.items() if value is not None}
    for name, fits in _signs(record, fields).items():
        if fits:
            return name
    raise DataError(f"a record with {', '.join(sorted(fields)[:8])} is of no known format; say which with --format")


def is_event(record: Any) -> bool:
    """Return whether a record is an event of OpenHands, of its runtime or of its SDK."""
    if not isinstance(record, Mapping):
        return False
    old = isinstance(record.get("source"), str) and ("action" in record or "observation" in record)
    return old or str(record.get("kind")).endswith("Event")


def _signs(record: Mapping[str, Any], fields: set[str]) -> dict[Format, bool]:
    """Return for each format whether the record looks like it, the surest signs first."""
    inner = record.get("trajectory")
    steps = inner.get("steps") if isinstance(inner, Mapping) else record.get("steps")
    step, told = _first(steps), _first(inner)
    events = next((record[name] for name in ("history", "events", "trajectory") if record.get(name)), None)
    has_source = "source" in step
    asked = request_of(record)
    is_api = asked is not record or any(isinstance(record.get(name), (list, tuple)) for name in ("input", "output"))
    is_told = are_steps(steps) or are_steps(inner)
    return {
        "rfc010": {"action_mask", "obs_mask"} <= fields,
        "harbor": {"trial_name", "trajectory"} <= fields,
        "inspect": "eval_task" in fields or {"eval", "samples"} <= fields or {"eval", "plan"} <= fields
        or {"epoch", "messages", "scores"} <= fields,
        "mini-swe-agent": str(record.get("trajectory_format")).startswith("mini-swe-agent") or _exits(record),
        "openhands": is_event(_first(_first_list(events))) or is_event(record),
        "swe-agent": ("history" in fields and "trajectory" in fields) or {"response", "observation"} <= set(told),
        "skyrl": {"response_ids", "loss_masks"} <= fields or {"input_prompt", "output_response"} <= fields,
        "rllm": "trajectories" in fields or {"response_ids", "chat_completions"} & set(step) != set(),
        "verifiers": "nodes" in fields or {"prompt", "completion"} <= fields,
        "trl": {"prompt_ids", "completion_ids"} <= fields,
        "atif": has_source or str(record.get("schema_version")).startswith("ATIF"),
        "openenv": {"episode_id", "tool_trace"} <= fields or {"schema_version", "turns"} <= fields
        or ("steps" in fields and not is_told),
        "turns": bool({"turns", "rollout_details", "prompt_token_ids"} & fields)
        or (isinstance(inner, (list, tuple)) and "role" not in told and not is_told),
        "chat": is_told or any(asked.get(name) is not None for name in LISTS)
        or (asked.get("input") is not None and is_api),
    }  # fmt: skip


def _first_list(values: Any) -> Any:
    first = values[0] if isinstance(values, (list, tuple)) and values else None
    return first if isinstance(first, (list, tuple)) else values  # OpenHands once kept pairs of events


def _first(values: Any) -> Mapping[str, Any]:
    first = values[0] if isinstance(values, (list, tuple)) and values else None
    return first if isinstance(first, Mapping) else {}


def _exits(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "exit"
