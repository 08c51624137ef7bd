"""One conversation, kept where APIs, data sets and coding agents keep it, is one trajectory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backtalk.errors import DataError
from backtalk.exchange.logged import messages_in, session_messages
from backtalk.exchange.read.files import import_files, import_record
from backtalk.exchange.read.observations import Observations
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.trajectory import Trajectory
from tiny import tiny_tokenizer

RENDERER = Renderer(tiny_tokenizer(), (), RendererConfig(tool_format=ToolFormat.HERMES))
OPTIONS = Observations(renderer=RENDERER)
LS = '{"command": "ls"}'
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "list files"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "bash", "arguments": LS}}]}
TOLD, DONE = {"role": "tool", "tool_call_id": "c", "content": "a.txt"}, {"role": "assistant", "content": "One."}
PLAIN = [SYSTEM, USER, CALL, TOLD, DONE]
REST = [USER, CALL, TOLD]

USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "bash", "input": {"command": "ls"}}]}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "a.txt"}]}
ITEMS = [
    {"role": "user", "content": "list files"},
    {"type": "function_call", "call_id": "c", "name": "bash", "arguments": LS},
    {"type": "function_call_output", "call_id": "c", "output": "a.txt"},
]
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One."}]}
CONTENTS = [
    {"role": "user", "parts": [{"text": "list files"}]},
    {"role": "model", "parts": [{"functionCall": {"name": "bash", "args": {"command": "ls"}}}]},
    {"role": "user", "parts": [{"functionResponse": {"name": "bash", "response": "a.txt"}}]},
]
RECORDS: dict[str, Any] = {
    "a request with the first choice of its reply": {
        "request": {"model": "m", "messages": [SYSTEM, *REST]},
        "response": {"choices": [{"index": 0, "message": DONE}, {"index": 1, "message": USER}]},
    },
    "choices beside messages": {"messages": [SYSTEM, *REST], "choices": [{"message": DONE}]},
    "a text beside messages": {"messages": [SYSTEM, *REST], "response": "One."},
    "a reply that the messages have": {"messages": PLAIN, "response": "One."},
    "Anthropic's system": {"system": "Be brief.", "messages": [USER, USED, RESULT, DONE]},
    "Anthropic's system in blocks, and its reply": {
        "request": {"system": [{"type": "text", "text": "Be brief."}], "messages": [USER, USED, RESULT]},
        "response": {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "One."}]},
    },
    "a system that the messages have": {"system": "Other.", "messages": PLAIN},
    "the Responses API": {"instructions": "Be brief.", "input": ITEMS, "output": [SAID]},
    "a request of the Responses API": {
        "request": {"input": [SYSTEM, *ITEMS]},
        "response": {"object": "response", "output": [{"type": "reasoning", "summary": []}, SAID]},
    },
    "a prompt of the Responses API": {
        "input": "list files",
        "instructions": "Be brief.",
        "output": [*ITEMS[1:], SAID],
    },
    "Gemini's": {
        "contents": CONTENTS,
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "candidates": [{"content": {"role": "model", "parts": [{"text": "One."}]}}],
    },
    "ShareGPT's system": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "list files"},
            {"from": "function_call", "value": json.dumps({"name": "bash", "arguments": {"command": "ls"}})},
            {"from": "observation", "value": "a.txt"},
            {"from": "gpt", "value": "One."},
        ],
    },
    "LangChain's dumps": {
        "messages": [
            {"lc": 1, "type": "constructor", "id": ["x"], "kwargs": {"type": "system", "content": "Be brief."}},
            {"lc": 1, "type": "constructor", "id": ["x"], "kwargs": {"type": "human", "content": "list files"}},
            {"lc": 1, "type": "constructor", "id": ["x"], "kwargs": {"type": "ai", "content": "", "tool_calls": [
                {"name": "bash", "args": {"command": "ls"}, "id": "c"}]}},
            {"lc": 1, "type": "constructor", "id": ["x"], "kwargs": {"type": "tool", "content": "a.txt"}},
            {"lc": 1, "type": "constructor", "id": ["x"], "kwargs": {"type": "ai", "content": "One."}},
        ]
    },
}  # fmt: skip


def tokens(trajectory: Trajectory) -> list[Any]:
    return [(segment.role, segment.turn, segment.token_ids) for segment in trajectory.segments]


def imported(record: Any) -> list[Any]:
    return tokens(import_record(record, None, lambda tools: RENDERER, OPTIONS))


@pytest.mark.parametrize("place", RECORDS)
def test_every_place_gives_the_same_tokens(place: str) -> None:
    assert imported(RECORDS[place]) == imported({"messages": PLAIN})


def test_steps_of_text_are_a_conversation_with_tools() -> None:
    steps = [
        {"thought": "Look.", "action": "ls", "observation": "a.txt"},
        {"action": "One.", "observation": None},
    ]
    told = [USER, {"role": "assistant", "content": "Look.\nls"}, {"role": "tool", "content": "a.txt"}, DONE]
    for record in ({"task": "list files", "steps": steps}, {"question": "list files", "trajectory": steps}):
        assert imported(record) == imported({"messages": told})
    with pytest.raises(DataError, match="a record of steps has no 'task' or 'instruction'"):
        imported({"steps": steps})


def test_a_data_set_that_writes_text_for_content_is_read() -> None:
    said = [
        {"role": "system", "text": None, "system_prompt": "Be brief."},
        {"role": "user", "text": "list files"},
        {"role": "ai", "text": "```\nls\n```"},
        {"role": "user", "text": "a.txt"},
    ]
    plain = [SYSTEM, USER, {"role": "assistant", "content": "```\nls\n```"}, {"role": "user", "content": "a.txt"}]
    assert imported({"instance_id": "a", "target": True, "trajectory": said}) == imported({"messages": plain})


@pytest.mark.parametrize(
    "beside",
    [
        {"choices": [{"label": "A", "text": "one"}]},
        {"output": [{"score": 1}]},
        {"instructions": "How to grade it."},
        {"response": {"score": 1}},
        {"candidates": 3},
    ],
)
def test_fields_of_the_same_names_that_are_no_messages_change_nothing(beside: dict[str, Any]) -> None:
    told = [USER, CALL, TOLD]
    assert imported({"messages": told, **beside}) == imported({"messages": told})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "soon"}, "messages is a text that is not JSON"),
        ({"messages": {"a": 1}}, "messages is a dict; a conversation is a list"),
        ({"request": {"model": "m"}}, "or has them under 'messages'"),
    ],
)
def test_a_record_without_messages_says_so(record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        messages_in(record)


def entry(kind: str, message: Any, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "uuid": "u", "sessionId": "s", **fields}


def part(kind: str, identifier: str = "m1", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "id": identifier, "content": [{"type": kind, **fields}]}


CLAUDE_CODE = [
    {"type": "summary", "summary": "Files", "leafUuid": "u"},
    entry("user", {"role": "user", "content": "Caveat: commands"}, isMeta=True),
    entry("user", USER),
    entry("assistant", part("thinking", thinking="hm", signature="x")),
    entry("assistant", part("text", text="Looking.")),
    entry("assistant", part("tool_use", id="c", name="bash", input={"command": "ls"})),
    entry("user", {"role": "user", "content": "of another agent"}, isSidechain=True),
    entry("user", RESULT, toolUseResult={"stdout": "a.txt"}),
    {"type": "system", "content": "compacted", "uuid": "u", "sessionId": "s"},
    entry("assistant", part("text", "m2", text="One.")),
]


def item(kind: str, **fields: Any) -> dict[str, Any]:
    return {"timestamp": "2026-01-01T00:00:00Z", "type": "response_item", "payload": {"type": kind, **fields}}


CODEX = [
    {"timestamp": "2026-01-01T00:00:00Z", "type": "session_meta", "payload": {"id": "s", "cwd": "/"}},
    item("message", role="user", content=[{"type": "input_text", "text": "list files"}]),
    {"timestamp": "2026-01-01T00:00:00Z", "type": "event_msg", "payload": {"type": "user_message", "message": "x"}},
    item("reasoning", summary=[{"type": "summary_text", "text": "hm"}], encrypted_content="x"),
    item("message", role="assistant", content=[{"type": "output_text", "text": "Looking."}]),
    item("function_call", name="bash", arguments=LS, call_id="c"),
    item("function_call_output", call_id="c", output="a.txt"),
    item("message", role="assistant", content=[{"type": "output_text", "text": "One."}]),
]


@pytest.mark.parametrize("lines", [CLAUDE_CODE, CODEX], ids=["Claude Code", "Codex"])
def test_the_lines_of_a_session_are_one_rollout(tmp_path: Path, lines: list[Any]) -> None:
    path = tmp_path / "session.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = import_files([path], None, lambda tools: RENDERER, OPTIONS)
    assert [tokens(trajectory) for trajectory in found.trajectories] == [
        imported({"messages": [USER, {**CALL, "content": "Looking."}, TOLD, DONE]})
    ]
    assert found.refusals == ()
    path.write_text(path.read_text() + '{"type": "user", "mess')  # cut while it was written
    cut = import_files([path], None, lambda tools: RENDERER, OPTIONS)
    assert [refusal.where for refusal in cut.refusals] == [f"{path}:{len(lines) + 1}"]


def test_a_patch_of_codex_is_a_call() -> None:
    patch = item("custom_tool_call", name="apply_patch", input="*** Begin Patch", call_id="p")
    lines = [*CODEX[:2], patch, item("custom_tool_call_output", call_id="p", output="Done"), CODEX[-1]]
    call = {"name": "apply_patch", "arguments": {"input": "*** Begin Patch"}}
    plain = [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "p", "function": call}]}]
    answers = [{"role": "tool", "tool_call_id": "p", "content": "Done"}, DONE]
    assert imported({"messages": session_messages(lines)}) == imported({"messages": [*plain, *answers]})


def test_a_list_of_typed_messages_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    call = {"type": "ai", "content": "", "tool_calls": [{"name": "bash", "args": {"command": "ls"}, "id": "c"}]}
    told = [{"type": "tool", "content": "a.txt", "tool_call_id": "c"}, {"type": "ai", "content": "One."}]
    path.write_text(json.dumps([{"type": "human", "content": "list files"}, call, *told]))
    found = import_files([path], None, lambda tools: RENDERER, OPTIONS)
    assert [tokens(t) for t in found.trajectories] == [imported({"messages": [*REST, DONE]})]
