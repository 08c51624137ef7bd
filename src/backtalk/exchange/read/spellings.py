"""Read chat messages in the spellings of the libraries that write them, as one kind of message.

OpenAI's chat format, older (``function_call``, role ``function``) and newer (items of the Responses API); Anthropic's
parts ``tool_use`` and ``tool_result``; ``from`` and ``value``; inspect_ai's calls, whose ``function`` is a name; calls,
content and whole lists that a data set keeps as JSON text; reasoning in any of its fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.logged import ITEMS
from backtalk.exchange.plain import first_of, mapping, parsed, plain
from backtalk.language.openai_chat import THOUGHTS, content_text, read_call, reasoning_text
from backtalk.messages import Part, ToolCall

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "ai", "model", "agent", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "environment", "tool_response"), "tool"),
    **dict.fromkeys(("tool_result", "tool_output", "function_response", "function_result"), "tool"),
}
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
    observed: bool = False  # the environment said it, whatever the role

    @property
    def commands(self) -> tuple[str, ...]:
        """Return every text that the agent gave to a tool, or that it wrote as keystrokes of a terminal."""
        written = () if self.calls else _KEYSTROKES.findall(self.text)
        given = (x for call in self.calls for x in call.arguments.values() if isinstance(x, str))
        return (*given, *(json.loads(text, strict=False) for text in written))


def joined(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages, those of an agent that follow each other as one: what it said before it was answered."""
    found: list[ChatMessage] = []
    for message in messages:
        if message.role == "assistant" and found and found[-1].role == "assistant":
            before = found.pop()
            text = "\n".join(filter(None, (before.text, message.text)))
            reasoning = "\n".join(filter(None, (before.reasoning, message.reasoning)))
            message = replace(before, text=text, reasoning=reasoning, calls=(*before.calls, *message.calls))
        found.append(message)
    return found


def chat_messages(raw: Any, what: str = "messages") -> list[ChatMessage]:
    """Return messages in any of the spellings. A tool's message gets its tool from its name or the call it answers.

    Raises:
        DataError: an unknown role, content that is not text, or arguments that are no JSON object; it names message
            and call.
    """
    messages = parsed(raw, what)
    if not isinstance(messages, (list, tuple)):
        raise DataError(f"{what} is a {type(messages).__name__}; a conversation is a list of messages")
    found: list[ChatMessage] = []
    tools: dict[str, str] = {}
    waiting: list[str] = []  # tools of calls that no message has answered yet
    items = False
    for where, message in _flat(messages):
        items = items or (message.get("type") in ITEMS and message.get("role") is None)
        for said, ids in _read(message, where):
            if said.role == "assistant":
                tools |= {ids[i]: call.tool for i, call in enumerate(said.calls) if ids[i]}
                waiting = [*(waiting if items else ()), *(call.tool for call in said.calls)]
            elif said.role == "tool":
                tool = said.tool or tools.get(ids[0]) or (waiting[0] if waiting and ids[0] not in tools else None)
                if tool in waiting:
                    waiting.remove(tool)
                said = replace(said, tool=tool)
            found.append(said)
    return joined(found) if items else found


def _flat(messages: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each message after its place; a whole response of the Responses API as its items."""
    for position, entry in enumerate(messages):
        where = f"message {position}"
        message = mapping(parsed(entry, where), where)
        if isinstance(message.get("data"), Mapping) and "content" in message["data"]:  # LangChain's older dumps
            message = {**message["data"], "type": message.get("type")}
        if message.get("lc") and isinstance(message.get("kwargs"), Mapping):  # its newer ones
            message = message["kwargs"]
        if message.get("object") == "response" and isinstance(message.get("output"), (list, tuple)):
            yield from ((where, {**mapping(item, where), "role": None}) for item in message["output"])
        else:
            yield where, message


def _read(message: Mapping[str, Any], where: str) -> Iterator[tuple[ChatMessage, list[str]]]:
    """Yield the role and text of a message with ids: of the calls it makes, or of the call it answers."""
    kind = message.get("type") if message.get("role") is None else None
    if kind == "function_call_output":
        text = content_text(_content(message.get("output")), where)
        yield ChatMessage(role="tool", text=text), [str(message.get("call_id") or "")]
        return
    if kind == "reasoning":
        yield ChatMessage(role="assistant", text="", reasoning=reasoning_text(message)), []
        return
    named = "assistant" if kind in ("function_call", "message") else first_of(message, "role", "from", "type")
    role = _ROLES.get(str(named).lower())
    if role is None:
        raise DataError(f"{where} has role {named!r}; known are system, user, assistant and tool")
    content = _content(first_of(message, "content", "value", "parts", "text", "system_prompt"))
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, (list, tuple)) else []
    for part in parts:
        if part.get("type") == "tool_result":
            text = content_text(_content(part.get("content")), f"a tool_result of {where}")
            yield ChatMessage(role="tool", text=text), [str(part.get("tool_use_id") or "")]
        elif (answer := first_of(part, *_ANSWERS)) is not None:
            yield _answer(mapping(parsed(answer, where), f"a function's answer of {where}")), [""]
    if isinstance(content, (list, tuple)):
        content = [part for part in content if not isinstance(part, Mapping) or not _is_no_text(part)]
    answered = any(part.get("type") == "tool_result" or first_of(part, *_ANSWERS) is not None for part in parts)
    if role == "assistant":
        raw = list(_calls(message, kind, named, parts, where))
        calls = [_call(call, f"call {number} of {where}") for number, call in enumerate(raw)]
        text = "" if named in _CALLS else content_text(content, where)
        made, reasoning = tuple(call for call, _ in calls), reasoning_text({**message, "content": parts})
        yield ChatMessage(role=role, text=text, calls=made, reasoning=reasoning), [i for _, i in calls]
    elif content or not answered:
        text = content_text(content, where)
        if role == "tool":
            text = text or content_text(
                first_of(mapping(message.get("error") or {}, f"the error of {where}"), "message")
            )
        name = first_of(message, "name", "tool_name", "function") if role == "tool" else None
        yield (
            ChatMessage(role=role, text=text, tool=name if isinstance(name, str) else None),
            [str(first_of(message, "tool_call_id", "call_id") or next(iter(message.get("tool_call_ids") or ()), ""))],
        )


_CALLS = ("function_call", "tool_call")  # roles
_ASKS, _ANSWERS = ("functionCall", "function_call"), ("functionResponse", "function_response")  # Gemini's parts


def _answer(answer: Mapping[str, Any]) -> ChatMessage:
    said = answer.get("response")
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return ChatMessage(role="tool", text=text, tool=str(answer.get("name")))


def _is_no_text(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("tool_use", "tool_result", *THOUGHTS) or first_of(part, *_ASKS, *_ANSWERS) is not None


def _content(content: Any) -> Any:
    return [content] if isinstance(content, Mapping) else content


def _calls(
    message: Mapping[str, Any], kind: Any, named: Any, parts: Sequence[Mapping[str, Any]], where: str
) -> Iterator[Any]:
    """Yield a message's calls as they are written."""
    if kind == "function_call":
        yield message
    elif named in _CALLS:
        spelled = parsed(first_of(message, "content", "value"), where)
        yield from spelled if isinstance(spelled, list) else [spelled]
    listed = parsed(message.get("tool_calls") or None, f"tool_calls of {where}") or ()
    listed = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(listed, (list, tuple)):
        raise DataError(f"tool_calls of {where} is a {type(listed).__name__}, not a list of calls")
    yield from listed
    if kind is None and message.get("function_call"):
        yield message["function_call"]
    yield from (part for part in parts if part.get("type") == "tool_use")
    yield from (asked for part in parts if (asked := first_of(part, *_ASKS)) is not None)


def _call(raw: Any, what: str) -> tuple[ToolCall, str]:
    """Return a call and its id, however it is written."""
    call = parsed(raw, what)
    call = plain(call) if not isinstance(call, str) else call
    if isinstance(call, Mapping):
        inner = call.get("function")
        inner = parsed(inner, what) if isinstance(inner, str) and inner.lstrip().startswith("{") else inner
        source = inner if isinstance(inner, Mapping) else call
        name = inner if isinstance(inner, str) else first_of(source, "name", "tool_name", "tool")
        arguments = first_of(source, "arguments", "input", "args", "parameters")
        if call.get("parse_error"):
            raise DataError(f"{what} could not be parsed by the library that wrote it: {call['parse_error']}")
        call = {"id": first_of(call, "call_id", "id", "tool_call_id"), "name": name, "arguments": arguments}
    found, identifier = read_call(call, what)
    return found, identifier or ""
