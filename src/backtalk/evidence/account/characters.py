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
from backtalk.exchange.read.conversation import Conversation, about_of
from backtalk.exchange.read.files import conversation_of, document_of, wrappers_of
from backtalk.exchange.read.harbor import about_trial
from backtalk.exchange.read.observations import DEFAULTS, Observations
from backtalk.exchange.read.openenv import awm_messages
from backtalk.exchange.read.speakers import observed_users
from backtalk.exchange.read.spellings import ChatMessage, chat_messages
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


def transcribed(record: Any, source: Format, name: str, options: Observations = DEFAULTS) -> Trajectory | None:
    """Return a record of messages as characters; None where it holds token ids, which have a text of their own.

    Raises:
        DataError: the messages cannot be read, or no agent speaks in them.
    """
    record = plain(record)
    inner = document_of(record, source)
    found = _conversation(record, inner, source, name)
    if found is None:
        return None
    options = replace(options, wrappers=options.wrappers or wrappers_of(inner, found))
    messages = observed_users(found.messages) if options.user_role is None else found.messages
    segments: list[Segment] = []
    typed: list[list[str]] = []  # in each turn
    for message in messages:
        if message.role == "assistant":
            typed.append(list(message.commands))
        segments += _written(message, typed, options)
    after = messages[next((i for i, m in enumerate(messages) if m.role == "assistant"), 0) :]
    users = [message for message in after if message.role == "user"]
    observed = sum(message.observed for message in users)
    return found.about.trajectory(
        [segment for segment in segments if len(segment)], user_messages=len(users) - observed, observed_users=observed
    )


def recounted(trajectory: Trajectory, decode: Decode, encode: Encode = characters) -> Trajectory:
    """Return the same rollout in other tokens, segment by segment. Logprobs are lost, so no action is sampled."""
    segments = [
        replace(segment, logprobs=None, token_ids=tuple(encode(decode(segment.token_ids))))
        for segment in trajectory.segments
    ]
    return replace(trajectory, segments=tuple(segment for segment in segments if len(segment)))


def _conversation(record: Any, inner: Any, source: Format, name: str) -> Conversation | None:
    if (found := conversation_of(record, source, name)) is not None:
        return found
    about = about_of(record, inner, name)
    match source:
        case "atif" | "harbor":
            steps = inner["steps"]
            if any((step.get("metrics") or {}).get("completion_token_ids") for step in steps):
                return None
            about = about_trial(record, about) if source == "harbor" else about
            return Conversation(messages=atif_messages(steps), about=about, wrappers=wrappers_of(inner, None))
        case "openenv" if record.get("steps") is not None:
            tools = ", ".join(map(str, record.get("tools") or ()))
            messages = awm_messages(record, f"{PREAMBLE}\n\nTask: {record['task']}\nAvailable tools: {tools}\n")
        case "openenv" if record.get("turns") is None and "rfc010" not in (record.get("extra") or {}):
            messages = chat_messages(record["messages"])
        case _:
            return None
    return Conversation(messages=messages, about=about)


def _written(message: ChatMessage, typed: Sequence[Sequence[str]], options: Observations) -> list[Segment]:
    """Return a message as characters. ``typed`` is what the agent gave to tools, turn by turn."""
    turn = len(typed) - 1 if typed else None
    if message.role == "assistant":
        calls = [
            json.dumps({"name": call.tool, "arguments": call.arguments}, sort_keys=True, ensure_ascii=False)
            for call in message.calls
        ]
        text = message.text + "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in calls)
        role = TokenRole.CONTEXT if message.given else TokenRole.ACTION
        return [Segment(role, characters(text), turn=turn)]
    if turn is None or message.given or message.role == "system":
        return [Segment(TokenRole.CONTEXT, characters(message.text), turn=turn)]
    if options.user_role is None:
        options = replace(options, user_role=TokenRole.ENV_OUTPUT if message.observed else TokenRole.CONTEXT)
    earlier = [command for commands in typed[:-1] for command in commands]
    said = options.message(message.role, message.text, message.tool, typed[-1], earlier)
    parts = list(message.parts or said.parts)
    told = [i for i, part in enumerate(parts) if part.role is TokenRole.ENV_OUTPUT and part.text]
    if message.role == "tool" and told:
        first, last = told[0], told[-1]
        parts[first] = Part(f"<tool_response>\n{parts[first].text}", TokenRole.ENV_OUTPUT)
        parts[last] = Part(f"{parts[last].text}\n</tool_response>\n", TokenRole.ENV_OUTPUT)
    return [Segment(part.role, characters(part.text), turn=turn, tool=message.tool) for part in parts]
