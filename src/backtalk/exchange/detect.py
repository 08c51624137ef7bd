"""Name the formats of trajectory records, and detect a record's format by the fields that only it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backtalk.errors import DataError

Format = Literal["chat", "atif", "turns", "trl", "verifiers", "openenv", "rfc010"]


def guess_format(record: Any) -> Format:
    """Return the format of a record.

    Raises:
        DataError: it looks like none of them.
    """
    if isinstance(record, (list, tuple)):
        first = record[0] if record else None
        return "chat" if isinstance(first, Mapping) and "role" in first else "turns"
    if not isinstance(record, Mapping):
        raise DataError(f"got {type(record).__name__}, and a record is an object or a list; is this the right file?")
    fields = {name for name, value in record.items() if value is not None}
    inner = record.get("trajectory")
    steps = inner.get("steps") if isinstance(inner, Mapping) else record.get("steps")
    has_source = isinstance(steps, (list, tuple)) and steps and isinstance(steps[0], Mapping) and "source" in steps[0]
    signs: dict[Format, bool] = {
        "rfc010": {"action_mask", "obs_mask"} <= fields,
        "verifiers": "nodes" in fields,
        "trl": {"prompt_ids", "completion_ids"} <= fields,
        "atif": bool(has_source) or str(record.get("schema_version")).startswith("ATIF"),
        "openenv": {"episode_id", "tool_trace"} <= fields or "steps" in fields or {"schema_version", "turns"} <= fields,
        "turns": bool({"turns", "rollout_details", "prompt_token_ids"} & fields) or isinstance(inner, (list, tuple)),
        "chat": "messages" in fields,
    }
    for name, fits in signs.items():
        if fits:
            return name
    raise DataError(f"a record with {', '.join(sorted(fields)[:8])} is of no known format; say which with --format")
