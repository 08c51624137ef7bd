"""Find the messages of a record: a list, an API's request with its reply, steps of text, or a coding agent's session.

What stands beside a list belongs to the conversation: a system prompt before it (Anthropic, Gemini, ShareGPT), the
reply after it. A session is the file of lines that Claude Code or Codex writes, and one rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, mapping, parsed, required, unpacked

LISTS = ("messages", "conversations", "conversation", "chat_completions", "trajectory", "contents")
_SYSTEM = ("system", "system_prompt", "system_instruction", "systemInstruction")
_TASK = ("task", "instruction", "question", "problem_statement", "goal", "query", "prompt")
_AGENT = ("assistant", "model", "gpt", "ai", "agent")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")  # of the Responses API
_SESSION_LINES = ("session_meta", "summary", "file-history-snapshot", "queue-operation")  # that may be the first


def messages_in(record: Mapping[str, Any]) -> list[Any]:
    """Return the messages of a record as they are written, in any of the spellings that `spellings` reads.

    Raises:
        DataError: it has none.
    """
    asked = request_of(record)
    name = next((name for name in (*LISTS, "input", "steps") if asked.get(name) is not None), None)
    if name is None:
        raise DataError("a chat record is a list of messages, or has them under 'messages'")
    found = unpacked(asked[name]) if name == "input" else parsed(asked[name], name)
    if isinstance(found, str):
        found = [{"role": "user", "content": found}]
    if not isinstance(found, (list, tuple)):
        raise DataError(f"{name} is a {type(found).__name__}; a conversation is a list of messages")
    found = list(_steps(record, found)) if are_steps(found) else list(found)
    system = first_of(asked, *_SYSTEM, *(("instructions",) if name == "input" else ()))
    if system is not None and not (found and _role(unpacked(found[0])) in ("system", "developer")):
        said = unpacked(system)
        found.insert(0, {"role": "system", **(said if isinstance(said, Mapping) else {"content": said})})
    if not (found and _role(unpacked(found[-1])) in _AGENT):
        found += _reply(record)
    return found


def request_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the request that a log keeps under ``request``, or the record itself."""
    request = record.get("request")
    return request if isinstance(request, Mapping) else record


def are_steps(values: Any) -> bool:
    """Return whether values are steps of an agent, each a text of action and of observation."""
    first = values[0] if isinstance(values, (list, tuple)) and values else None
    if not isinstance(first, Mapping) or "observation" not in first:
        return False
    return isinstance(first.get("action"), str) and isinstance(first["observation"], str | None)


def _steps(record: Mapping[str, Any], steps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "user", "content": required(record, "a record of steps", *_TASK)}
    for number, raw in enumerate(steps):
        step = mapping(raw, f"step {number}")
        yield {"role": "assistant", "content": "\n".join(filter(None, (step.get("thought"), step.get("action"))))}
        if step.get("observation"):
            yield {"role": "tool", "content": step["observation"]}


def _role(message: Any) -> Any:
    return first_of(message, "role", "from", "type") if isinstance(message, Mapping) else None


def _reply(record: Mapping[str, Any]) -> list[Any]:
    """Return the messages of the reply that a record keeps: the first choice, or all items of one; [] without any."""
    reply = unpacked(first_of(record, "response", "choices", "candidates", "output"))
    if isinstance(reply, Mapping):
        reply = first_of(reply, "choices", "candidates", "output") or [reply]
    if isinstance(reply, str) and record.get("response") is not None:
        return [{"role": "assistant", "content": reply}]
    if not isinstance(reply, (list, tuple)) or not all(isinstance(part, Mapping) for part in reply):
        return []
    choice = reply[0] if reply else {}
    for inner in ("message", "content"):  # OpenAI's and Gemini's
        if isinstance(choice.get(inner), Mapping):
            return [choice[inner]]
    are_messages = all("role" in part or part.get("type") in ITEMS for part in reply)
    return list(reply) if are_messages else []


# ---------------------------------------------------------------------- sessions


def is_session(line: Any) -> bool:
    """Return whether a line is one of the session file of a coding agent."""
    if not isinstance(line, Mapping) or not isinstance(line.get("type"), str):
        return False
    return line["type"] in _SESSION_LINES or ("sessionId" in line and "uuid" in line)


def session_messages(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the messages of a session: what subagents and the program itself said is left out.

    Claude Code writes a line for each part of a reply, which are put together here.
    """
    found: list[Any] = []
    for line in lines:
        said = line.get("payload") if line.get("type") == "response_item" else line.get("message")
        if not isinstance(said, Mapping) or line.get("isSidechain") or line.get("isMeta"):
            continue
        if said.get("type") in ("custom_tool_call", "custom_tool_call_output"):
            kind = str(said["type"]).replace("custom_tool", "function")
            said = {**said, "type": kind, "arguments": {"input": said.get("input")}}
        before = found[-1] if found else {}
        if before.get("role") == said.get("role") == "assistant" and "id" in said and before.get("id") == said["id"]:
            found[-1] = {**before, "content": [*_parts(before), *_parts(said)]}
        elif "role" in said or "call_id" in said or said.get("type") == "reasoning":
            found.append(said)
    return found


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
