"""Read chat messages in OpenAI's format, and render them by the model's own chat template.

Nobody can show that an assistant's text was sampled by our policy, so it is an unsampled ACTION: the policy term leaves
it alone, and what the environment answered is trained as anywhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import mapping, plain
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.turns import About
from backtalk.language.history import History
from backtalk.language.openai_chat import content_text, read_call, reasoning_text
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall
from backtalk.trajectory import Segment, TokenRole, Trajectory

_KEYSTROKES = re.compile(r'"keystrokes"\s*:\s*("(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")')


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message, whatever format it came in. ``parts`` says who wrote each stretch, where that is known."""

    role: str  # "system" | "user" | "assistant" | "tool"
    text: str
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    tool: str | None = None
    parts: tuple[Part, ...] = ()
    given: bool = False  # copied from elsewhere: CONTEXT, so that not even an observation may be learned from

    @property
    def commands(self) -> tuple[str, ...]:
        """Return every text that the agent gave to a tool, or that it wrote as keystrokes of a terminal."""
        written = () if self.calls else _KEYSTROKES.findall(self.text)
        given = (x for call in self.calls for x in call.arguments.values() if isinstance(x, str))
        return (*given, *(json.loads(text, strict=False) for text in written))


def trajectory_from_chat(messages: Sequence[ChatMessage], about: About, observations: Observations) -> Trajectory:
    """Return a trajectory of text: prompt CONTEXT, assistant ACTION, what tools said ENV_OUTPUT and WARNING.

    Raises:
        DataError: no prompt, no assistant, two assistant's messages without anything between them, or text that
            the tokenizer would make a control token that ends the turn.
        RenderError: the chat template cannot write this conversation, or the tool format one of its calls.
    """
    renderer = observations.renderer
    if renderer is None:
        raise DataError("messages are text, which needs a chat template and tokenizer; pass --model")
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), None)
    if not first:
        raise DataError("a conversation needs a prompt and then an assistant's message; this one has not both")
    prompt = [Message(m.role, (Part(m.text, TokenRole.CONTEXT),)) for m in messages[:first]]
    history = History()
    segments = list(history.begin(prompt, renderer))
    earlier: list[str] = []
    starts = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for start, end in pairwise([*starts, len(messages)]):
        assistant, answers = messages[start], messages[start + 1 : end]
        if not answers and end < len(messages):
            raise DataError(f"messages {start} and {end} are both the assistant's; put what was said to it between")
        ids = assistant_ids(assistant, renderer, keep_reasoning=observations.keep_reasoning)
        role = TokenRole.CONTEXT if assistant.given else TokenRole.ACTION
        segments.append(Segment(role, ids, turn=history.turns, branch=history.branch))
        history.act(ids)
        observed = [_observation(message, assistant, earlier, observations) for message in answers]
        earlier += assistant.commands
        segments += history.observe(observed, renderer) if observed else ()
    after = messages[first:]
    return about.trajectory(
        segments,
        drifts=history.branch,
        user_messages=sum(m.role == "user" for m in after),
        dropped_reasonings=0 if observations.keep_reasoning else sum(bool(m.reasoning) for m in after),
    )


def _observation(
    message: ChatMessage, assistant: ChatMessage, earlier: Sequence[str], observations: Observations
) -> Message:
    if assistant.given or message.given or message.role == "system":
        return Message(message.role, (Part(message.text, TokenRole.CONTEXT),), message.tool)
    if message.parts:
        return Message(message.role, message.parts, message.tool)
    return observations.message(message.role, message.text, message.tool, assistant.commands, earlier)


def assistant_ids(message: ChatMessage, renderer: Renderer, *, keep_reasoning: bool = False) -> tuple[int, ...]:
    """Return the ids of an assistant's message, tool calls in the renderer's tool format, with the end of turn."""
    thought = f"<think>\n{message.reasoning}\n</think>\n\n" if keep_reasoning and message.reasoning else ""
    calls = (renderer.encode_action(call)[:-1] for call in message.calls)
    decode = renderer.encoder.decode
    ids = renderer.encode_text("\n".join(filter(None, (thought + message.text, *map(decode, calls)))))
    early = next((position for position, token in enumerate(ids[:-1]) if token in renderer.stop_token_ids), None)
    if early is not None:
        raise DataError(
            f"token {early} of an assistant's message of {len(ids)} ends the turn, because its text spells out "
            "a control token of this model; that text cannot be told from a real end"
        )
    return ids


def openai_messages(messages: Sequence[Any]) -> list[ChatMessage]:
    """Read messages in OpenAI's format; a tool's message gets its tool from ``name``, or from the call that it answers.

    Raises:
        DataError: an unknown role, content that is not text, or arguments that are no JSON object.
    """
    found: list[ChatMessage] = []
    tools: dict[str, str] = {}
    for position, raw in enumerate(messages):
        message, what = mapping(raw, f"message {position}"), f"message {position}"
        role = "system" if message.get("role") == "developer" else message.get("role")  # OpenAI's new name of it
        if role not in ("system", "user", "assistant", "tool"):
            raise DataError(f"{what} has role {role!r}; known are system, user, assistant and tool")
        calls = [read_call(plain(call), f"a tool call of {what}") for call in message.get("tool_calls") or ()]
        tools |= {str(call_id): call.tool for call, call_id in calls}
        tool = (message.get("name") or tools.get(str(message.get("tool_call_id")))) if role == "tool" else None
        found.append(
            ChatMessage(
                role=role,
                text=content_text(message.get("content"), what),
                calls=tuple(call for call, _ in calls),
                reasoning=reasoning_text(message),
                tool=None if tool is None else str(tool),
            )
        )
    return found
