"""Chat messages in OpenAI's format, rendered by the model's own chat template.

Their assistant's text was not sampled by our policy, or nobody can show that it was: it is an unsampled ACTION. So the
policy term leaves it alone, and what the world said is trained as anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.plain import mapping, plain
from backtalk.exchange.read.turns import About
from backtalk.language.history import History
from backtalk.language.openai_chat import content_text, read_call, reasoning_text
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall
from backtalk.trajectory import Segment, TokenRole, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message, whatever format it came in. ``parts`` says who wrote each stretch, where that is known."""

    role: str  # "system" | "user" | "assistant" | "tool"
    text: str
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # tool and arguments
    reasoning: str = ""
    tool: str | None = None
    parts: tuple[Part, ...] = ()
    given: bool = False  # copied from elsewhere: CONTEXT, so that not even an observation may be learned from

    @property
    def commands(self) -> tuple[str, ...]:
        """Every text that the agent gave to a tool."""
        return tuple(x for _, arguments in self.calls for x in arguments.values() if isinstance(x, str))


def trajectory_from_chat(
    messages: Sequence[ChatMessage],
    about: About,
    observations: Observations,
    *,
    keep_reasoning: bool = False,
) -> Trajectory:
    """One trajectory of text: prompt CONTEXT, assistant ACTION, what tools said ENV_OUTPUT and WARNING.

    ``keep_reasoning`` writes a message's reasoning before its text, in <think> tags; without it, it is left out and
    counted, as most chat templates do with what is not the last turn.

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
    position = first
    while position < len(messages):
        assistant = messages[position]
        end = next((i for i in range(position + 1, len(messages)) if messages[i].role == "assistant"), len(messages))
        if end == position + 1 < len(messages):
            raise DataError(f"messages {position} and {end} are both the assistant's; put what was said to it between")
        ids = assistant_ids(assistant, renderer, keep_reasoning=keep_reasoning)
        role = TokenRole.CONTEXT if assistant.given else TokenRole.ACTION
        segments.append(Segment(role, ids, turn=history.turns, branch=history.branch))
        history.act(ids)
        said = [_observation(m, assistant, observations) for m in messages[position + 1 : end]]
        segments += history.observe(said, renderer) if said else ()
        position = end
    after = messages[first:]
    return about.trajectory(
        segments,
        drifts=history.branch,
        user_messages=sum(m.role == "user" for m in after),
        dropped_reasonings=0 if keep_reasoning else sum(bool(m.reasoning) for m in after),
    )


def _observation(message: ChatMessage, assistant: ChatMessage, observations: Observations) -> Message:
    if assistant.given or message.given or message.role == "system":
        return Message(message.role, (Part(message.text, TokenRole.CONTEXT),), message.tool)
    if message.parts:
        return Message(message.role, message.parts, message.tool)
    return observations.message(message.role, message.text, message.tool, assistant.commands)


def assistant_ids(message: ChatMessage, renderer: Renderer, *, keep_reasoning: bool = False) -> tuple[int, ...]:
    """The ids of an assistant's message, tool calls in the renderer's tool format, with the end of turn."""
    text = message.text
    if keep_reasoning and message.reasoning:
        text = f"<think>\n{message.reasoning}\n</think>\n\n{text}"
    pieces = [text] if text else []
    for tool, arguments in message.calls:
        pieces.append(_call_text(tool, arguments, renderer))
    ids = renderer.encode_text("\n".join(pieces))
    early = [position for position, token in enumerate(ids[:-1]) if token in renderer.stop_token_ids]
    if early:
        raise DataError(
            f"token {early[0]} of an assistant's message of {len(ids)} ends the turn, because its text spells out "
            "a control token of this model; that text cannot be told from a real end"
        )
    return ids


def _call_text(tool: str, arguments: Mapping[str, Any], renderer: Renderer) -> str:
    ids = renderer.encode_action(ToolCall(tool, arguments))
    return renderer.tokenizer.backend_tokenizer.decode(list(ids[:-1]), skip_special_tokens=False)


def openai_messages(messages: Sequence[Any]) -> list[ChatMessage]:
    """Messages in OpenAI's format; a tool's message gets its tool from ``name``, or from the call that it answers.

    Raises:
        DataError: an unknown role, content that is not text, or arguments that are no JSON object.
    """
    found: list[ChatMessage] = []
    names: dict[str, str] = {}
    for position, raw in enumerate(messages):
        message = mapping(raw, f"message {position}")
        role = message.get("role")
        if role == "developer":  # what OpenAI calls a system message now
            role = "system"
        if role not in ("system", "user", "assistant", "tool"):
            raise DataError(f"message {position} has role {role!r}; known are system, user, assistant and tool")
        calls: list[tuple[str, Mapping[str, Any]]] = []
        for call in message.get("tool_calls") or ():
            found_call, identifier = read_call(plain(call), f"a tool call of message {position}")
            calls.append((found_call.tool, found_call.arguments))
            names[str(identifier)] = found_call.tool
        found.append(
            ChatMessage(
                role=role,
                text=content_text(message.get("content"), f"message {position}"),
                calls=tuple(calls),
                reasoning=reasoning_text(message),
                tool=_tool(message.get("name") or names.get(str(message.get("tool_call_id"))))
                if role == "tool"
                else None,
            )
        )
    return found


def _tool(name: Any) -> str | None:
    return None if name is None else str(name)
