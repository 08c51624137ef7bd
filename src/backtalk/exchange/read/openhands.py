"""Read events of OpenHands: actions and observations of its runtime (V0), and the events of its SDK (V1).

Read against OpenHands 0.6x, software-agent-sdk 1.x, and the ``history`` of their evaluations' ``output.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, mapping, parsed
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages
from backtalk.exchange.read.spellings import ChatMessage, chat_messages, joined
from backtalk.language.openai_chat import content_text
from backtalk.messages import Part, ToolCall
from backtalk.trajectory import Failure, StopReason, TokenRole

_SILENT = ("change_agent_state", "agent_state_changed", "null", "recall", "condensation", "condensation_request")
_NOT_ARGUMENTS = frozenset(
    "thought is_input hidden confirmation_state security_risk blocking is_static image_urls file_urls "
    "wait_for_response kind cwd is_confirmed keep_prompt".split()
)


def read_openhands(record: Any, name: str) -> Conversation:
    """Return the conversation of a list of events, or of a record that has them under ``history``.

    Raises:
        DataError: no events, or one that cannot be read.
    """
    outer = record if isinstance(record, Mapping) else {}
    raw = parsed(first_of(outer, "history", "events", "trajectory"), "history") if outer else record
    if not isinstance(raw, (list, tuple)) or not raw:
        raise DataError("a run of OpenHands is a list of events, or has them under 'history'; this one has none")
    flat = [event for entry in raw for event in (entry if isinstance(entry, (list, tuple)) else [entry])]
    events = [mapping(event, f"event {i}") for i, event in enumerate(flat)]
    found = [m for i, e in enumerate(events) for m in (_new(e, i) if e.get("kind") else _old(e, i))]
    about = replace(about_of(outer, {}, name), messages=kept_messages(events))
    if outer.get("instance_id") is not None:
        about = replace(about, task_id=str(outer["instance_id"]))
    report = mapping(outer.get("test_result") or {}, "test_result").get("report")
    resolved = first_of(mapping(report or outer.get("report") or {}, "the report"), "resolved")
    resolved = outer.get("resolved") if resolved is None else resolved
    if about.reward is None and isinstance(resolved, (bool, int, float)):
        about = replace(about, reward=float(resolved))
    if outer.get("error"):
        late = "maximum iteration" in str(outer["error"]).lower()
        failure = None if late else Failure("step", "AgentError", str(outer["error"]))
        about = replace(about, failure=failure, stop_reason=StopReason.MAX_TURNS)
    return Conversation(messages=_begun(joined(found)), about=about)


def _begun(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with the prompt first: an agent's state may be logged before the task is."""
    first = next((i for i, m in enumerate(messages) if m.role == "user"), 0)
    systems = [m for m in messages[:first] if m.role == "system"]
    return [*systems, *messages[first:]]


def _old(event: Mapping[str, Any], number: int) -> Iterator[ChatMessage]:
    """Yield the message of a runtime event: an action with its call as the model wrote it, or an observation."""
    where, meta = f"event {number}", event.get("tool_call_metadata") or {}
    args = mapping(event.get("args") or {}, f"args of {where}")
    kind = first_of(event, "action", "observation")
    if kind in _SILENT or kind is None:
        return
    if "action" in event and kind in ("system", "message"):
        text = str(first_of(args, "content") or first_of(event, "content", "message") or "")
        agent = event.get("source") == "agent" and kind == "message"
        yield ChatMessage(role="system" if kind == "system" else "assistant" if agent else "user", text=text)
    elif "action" in event:
        written = _written(meta, where)
        call = ToolCall(str(meta.get("function_name") or kind), _given(args))
        yield written or ChatMessage(role="assistant", text=str(args.get("thought") or ""), calls=(call,))
    else:
        text = content_text(first_of(event, "content"), where)
        role = TokenRole.WARNING if kind == "error" else TokenRole.ENV_OUTPUT
        tool = str(meta.get("function_name") or kind)
        yield ChatMessage(role="tool", text=text, tool=tool, parts=(Part(text, role),), observed=True)


def _written(meta: Mapping[str, Any], where: str) -> ChatMessage | None:
    """Return the model's own message of an action; None where it is not there, or made several calls."""
    choices = mapping(meta.get("model_response") or {}, f"model_response of {where}").get("choices")
    if not choices or meta.get("total_calls_in_response", 1) != 1:
        return None
    raw = mapping(choices[0], f"a choice of {where}").get("message")
    return next(iter(chat_messages([raw], f"model_response of {where}")), None) if raw else None


def _new(event: Mapping[str, Any], number: int) -> Iterator[ChatMessage]:
    """Yield the messages of an SDK event."""
    where, kind = f"event {number}", event.get("kind")
    tool = None if event.get("tool_name") is None else str(event["tool_name"])
    if kind == "SystemPromptEvent":
        yield ChatMessage(role="system", text=_text(event.get("system_prompt"), where))
    elif kind == "MessageEvent":
        said = mapping(event.get("llm_message") or {}, f"llm_message of {where}")
        agent = event.get("source") == "agent" or said.get("role") == "assistant"
        role = "assistant" if agent else "user"
        yield from chat_messages([{**said, "role": role}], f"llm_message of {where}")
    elif kind == "ActionEvent":
        raw = event.get("tool_call") or {"name": tool, "arguments": _given(event.get("action"))}
        said = {"role": "assistant", "content": _text(event.get("thought"), where), "tool_calls": [raw]}
        fields = {key: event.get(key) for key in ("reasoning_content", "thinking_blocks")}
        yield from chat_messages([{**said, **fields}], f"the action of {where}")
    elif kind in ("ObservationEvent", "UserRejectObservation", "AgentErrorEvent"):
        harness = kind != "ObservationEvent"
        text = str(first_of(event, "error", "rejection_reason") or "") if harness else _observed(event, where)
        part = Part(text, TokenRole.WARNING if harness else TokenRole.ENV_OUTPUT)
        yield ChatMessage(role="tool", text=text, tool=tool, parts=(part,), observed=True)


def _given(action: Any) -> dict[str, Any]:
    return {key: value for key, value in (action or {}).items() if key not in _NOT_ARGUMENTS and value is not None}


def _observed(event: Mapping[str, Any], where: str) -> str:
    found = event.get("observation")
    if isinstance(found, Mapping):
        found = first_of(found, "content", "output", "text", "message")
    return _text(found, where)


def _text(value: Any, where: str) -> str:
    """Return a text, one part of text, or a list of them."""
    parts: Sequence[Any] = [value] if isinstance(value, Mapping) else value
    if isinstance(parts, (list, tuple)):
        parts = [{"type": "text", **part} if isinstance(part, Mapping) else part for part in parts]
    return content_text(parts, where)
