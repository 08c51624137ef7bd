"""Write rollouts in characters, one token a character: it needs no model, and makes counts of any two comparable.

A record of messages is written as RFC 010's demo writes it: a call in <tool_call> tags, a result in <tool_response>
tags that count with the result. No chat template is involved, so nothing is TEMPLATE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from backtalk.exchange.detect import Format
from backtalk.exchange.plain import plain
from backtalk.exchange.read.atif import atif_messages
from backtalk.exchange.read.chat import ChatMessage, openai_messages
from backtalk.exchange.read.files import about_of
from backtalk.exchange.read.openenv import awm_messages
from backtalk.messages import Part
from backtalk.trajectory import Segment, TokenRole, Trajectory

Decode = Callable[[Sequence[int]], str]
Encode = Callable[[str], Sequence[int]]

# A recorded episode of the Agent World Model has no prompt. This one is as long as the demo's, 205 characters, so that
# counts of context compare too.
PREAMBLE = (
    "You act in a world by calling its tools, one at a time. Each call is answered with an observation: read it before "
    "you decide on the next call. When the task is done, call `verify`, which ends this episode."
)


def characters(text: str) -> tuple[int, ...]:
    """Return the code points of a text."""
    return tuple(map(ord, text))


def transcribed(record: Any, source: Format, name: str) -> Trajectory | None:
    """Return a record of messages as characters; None where it holds token ids, which have a text of their own.

    Raises:
        DataError: the messages cannot be read, or no agent speaks in them.
    """
    record = plain(record)
    inner = record["trajectory"] if source == "atif" and "trajectory" in record else record
    messages = _messages(inner, source)
    if messages is None:
        return None
    segments: list[Segment] = []
    turn: int | None = None
    for message in messages:
        if message.role == "assistant":
            turn = 0 if turn is None else turn + 1
        segments += _written(message, turn)
    return about_of(record, inner, name).trajectory([segment for segment in segments if len(segment)])


def recounted(trajectory: Trajectory, decode: Decode, encode: Encode = characters) -> Trajectory:
    """Return the same rollout in other tokens, segment by segment. Logprobs are lost, so no action is sampled."""
    segments = [
        replace(segment, logprobs=None, token_ids=tuple(encode(decode(segment.token_ids))))
        for segment in trajectory.segments
    ]
    return replace(trajectory, segments=tuple(segment for segment in segments if len(segment)))


def _messages(record: Any, source: Format) -> list[ChatMessage] | None:
    match source:
        case "chat":
            return openai_messages(record if isinstance(record, (list, tuple)) else record["messages"])
        case "atif":
            steps = record["steps"]
            has_ids = any((step.get("metrics") or {}).get("completion_token_ids") for step in steps)
            return None if has_ids else atif_messages(steps)
        case "openenv" if record.get("steps") is not None:
            tools = ", ".join(map(str, record.get("tools") or ()))
            return awm_messages(record, f"{PREAMBLE}\n\nTask: {record['task']}\nAvailable tools: {tools}\n")
        case "openenv" if record.get("turns") is None and "rfc010" not in (record.get("extra") or {}):
            return openai_messages(record["messages"])
        case _:
            return None


def _written(message: ChatMessage, turn: int | None) -> list[Segment]:
    """Return a message as characters. ``turn`` is None before the first."""
    if message.role == "assistant":
        calls = [
            json.dumps({"name": call.tool, "arguments": call.arguments}, sort_keys=True, ensure_ascii=False)
            for call in message.calls
        ]
        text = message.text + "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in calls)
        role = TokenRole.CONTEXT if message.given else TokenRole.ACTION
        return [Segment(role, characters(text), turn=turn)]
    if message.role != "tool" or turn is None or message.given:
        return [Segment(TokenRole.CONTEXT, characters(message.text), turn=turn)]
    parts = message.parts or (Part(message.text, TokenRole.ENV_OUTPUT),)
    return [Segment(part.role, characters(_enveloped(part)), turn=turn, tool=message.tool) for part in parts]


def _enveloped(part: Part) -> str:
    if part.role is not TokenRole.ENV_OUTPUT or not part.text:
        return part.text
    return f"<tool_response>\n{part.text}\n</tool_response>\n"
