"""Read chat messages in OpenAI's format, and render them by the model's own chat template.

Nobody can show that an assistant's text was sampled by our policy, so it is an unsampled ACTION: the policy term leaves
it alone, and what the environment answered is trained as anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from backtalk.errors import DataError
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.speakers import observed_users
from backtalk.exchange.read.spellings import ChatMessage
from backtalk.exchange.read.turns import About
from backtalk.language.history import History
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part
from backtalk.trajectory import Segment, TokenRole, Trajectory


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
    if observations.user_role is None:
        messages = observed_users(messages)
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
        user_messages=sum(m.role == "user" and not m.observed for m in after),
        observed_users=sum(m.role == "user" and m.observed for m in after),
        dropped_reasonings=0 if observations.keep_reasoning else sum(bool(m.reasoning) for m in after),
    )


def _observation(
    message: ChatMessage, assistant: ChatMessage, earlier: Sequence[str], observations: Observations
) -> Message:
    if assistant.given or message.given or message.role == "system":
        return Message(message.role, (Part(message.text, TokenRole.CONTEXT),), message.tool)
    if message.parts:
        return Message(message.role, message.parts, message.tool)
    if observations.user_role is None:
        observations = replace(observations, user_role=TokenRole.ENV_OUTPUT if message.observed else TokenRole.CONTEXT)
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
