"""One conversation in every form that writers of data sets give it is one trajectory, and one served prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backtalk.errors import DataError
from backtalk.exchange.read.files import import_files, import_record
from backtalk.exchange.read.observations import Observations
from backtalk.language.openai_chat import read_assistant
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.rollout.sampler import SamplingParams, ScriptedSampler
from backtalk.run.serve import Endpoint
from backtalk.trajectory import TokenRole
from tiny import tiny_tokenizer

RENDERER = Renderer(tiny_tokenizer(), (), RendererConfig(tool_format=ToolFormat.HERMES))
USER = {"role": "user", "content": "list files"}
THINKING = Observations(renderer=RENDERER, keep_reasoning=True)


def calls(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": arguments}, **fields}


TOLD = {"role": "tool", "tool_call_id": "c1", "content": "a.txt"}
PLAIN = [USER, {"role": "assistant", "content": "Looking.", "tool_calls": [calls('{"command": "ls"}')]}, TOLD]
SAID = {"role": "assistant", "content": "Looking."}

# Of all importers; those that are marked are of servers' histories too.
FORMS: dict[str, list[Any]] = {
    "content as parts": [
        {"role": "user", "content": [{"type": "text", "text": "list "}, {"type": "text", "text": "files"}]},
        {**PLAIN[1], "content": [{"type": "text", "text": "Looking."}]},
        {**TOLD, "content": [{"type": "text", "text": "a.txt"}]},
    ],
    "content as one part": [
        {"role": "user", "content": {"type": "text", "text": "list files"}},
        {**PLAIN[1], "content": {"type": "text", "text": {"value": "Looking.", "annotations": []}}},
        TOLD,
    ],
    "arguments as an object": [USER, {**SAID, "tool_calls": [calls({"command": "ls"})]}, TOLD],
    "arguments as JSON in JSON": [USER, {**SAID, "tool_calls": [calls(json.dumps('{"command": "ls"}'))]}, TOLD],
    "calls as texts": [USER, {**SAID, "tool_calls": [json.dumps(calls({"command": "ls"}))]}, TOLD],
    "all calls as a text": [USER, {**SAID, "tool_calls": json.dumps([calls({"command": "ls"})])}, TOLD],
    "older": [
        USER,
        {**SAID, "function_call": {"name": "bash", "arguments": '{"command": "ls"}'}},
        {"role": "function", "name": "bash", "content": "a.txt"},
    ],
    "one call, not a list": [USER, {**SAID, "tool_calls": calls('{"command": "ls"}')}, TOLD],
    "tool_use": [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "c1", "name": "bash", "input": {"command": "ls"}},
            ],
        },
        TOLD,
    ],
}
FOREIGN: dict[str, list[Any]] = {
    "tool_result": [
        *FORMS["tool_use"][:2],
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a.txt"}]},
    ],
    "from and value": [
        {"from": "human", "value": "list files"},
        {"from": "gpt", "value": "Looking.", "tool_calls": [calls('{"command": "ls"}')]},
        {"from": "observation", "value": "a.txt"},
    ],
    "items of a response": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list files"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
        {"type": "function_call", "call_id": "c1", "name": "bash", "arguments": '{"command": "ls"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
    ],
    "type in place of role": [
        {"type": "human", "content": "list files"},
        {"type": "ai", "content": "Looking.", "tool_calls": [{"name": "bash", "args": {"command": "ls"}, "id": "c1"}]},
        {"type": "tool", "content": "a.txt", "tool_call_id": "c1"},
    ],
    "data": [
        {"type": "human", "data": {"content": "list files", "type": "human"}},
        {"type": "ai", "data": {"content": "Looking.", "tool_calls": [{"name": "bash", "args": {"command": "ls"}}]}},
        {"type": "tool", "data": {"content": "a.txt"}},
    ],
    "parts": [
        {"role": "user", "parts": [{"text": "list files"}]},
        {
            "role": "model",
            "parts": [{"text": "Looking."}, {"functionCall": {"name": "bash", "args": {"command": "ls"}}}],
        },
        {"role": "user", "parts": [{"functionResponse": {"name": "bash", "response": "a.txt"}}]},
    ],
}


def imported(messages: Any, options: Observations = THINKING, **fields: Any) -> list[tuple[TokenRole, tuple[int, ...]]]:
    trajectory = import_record({"messages": messages, **fields}, "chat", lambda tools: RENDERER, options)
    return [(segment.role, segment.token_ids) for segment in trajectory.segments]


@pytest.mark.parametrize("form", FORMS | FOREIGN)
def test_every_form_is_imported_as_the_same_tokens(form: str) -> None:
    assert imported((FORMS | FOREIGN)[form]) == imported(PLAIN)


def test_the_list_itself_may_be_a_text() -> None:
    assert imported(json.dumps(PLAIN)) == imported([json.dumps(message) for message in PLAIN]) == imported(PLAIN)


async def prompt_of(messages: list[Any]) -> list[int]:
    served = Endpoint(
        RENDERER,
        lambda params: ScriptedSampler(["on"], RENDERER.encode_text),
        SamplingParams(max_tokens=50),
        max_tokens=900,
    )
    tool = {"name": "bash", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}}
    body = {"messages": messages, "tools": [{"type": "function", "function": tool}]}
    return (await served.complete(body))["prompt_token_ids"]


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_of_a_history_is_served_as_the_same_prompt(form: str) -> None:
    assert await prompt_of(FORMS[form]) == await prompt_of(PLAIN)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"thinking": "hm"},
        {"provider_specific_fields": {"reasoning_content": "hm"}},
        {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}, {"type": "reasoning.encrypted", "data": "x"}]},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "ls"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "ls"},
            ]
        },
        {"content": [{"type": "reasoning", "text": "hm"}, "ls"]},
        {"content": [{"thought": True, "text": "hm"}, {"text": "ls"}]},
    ],
)
def test_reasoning_is_found_in_every_field(fields: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "ls", "reasoning_content": None, **fields}
    read = read_assistant(message)
    assert (read.reasoning, read.text) == ("hm", "ls")
    wanted = imported([USER, {"role": "assistant", "content": "ls", "reasoning_content": "hm"}])
    assert imported([USER, message]) == wanted
    assert "<think>\nhm\n</think>" in str(tiny_tokenizer().decode(list(wanted[-1][1])))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**SAID, "tool_calls": [calls("{broken")]}, "call 0 of message 1 has arguments that are not JSON"),
        ({**SAID, "tool_calls": [calls('"just text"')]}, "call 0 of message 1 has arguments that are not JSON"),
        ({**SAID, "tool_calls": "soon"}, "tool_calls of message 1 is a text that is not JSON"),
        ({"role": "assistant", "content": {"type": "image_url"}}, "message 1 holds 'image_url'"),
    ],
)
def test_what_cannot_be_read_names_message_and_call(message: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        imported([USER, message, TOLD])


ROW = {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, 6], "tool_mask": [1, 0, 1], "logprobs": [-1.0, 0.0, -2.0]}


@pytest.mark.parametrize(
    "padded",
    [
        {"prompt_ids": [0, 0, 1, 2, 3], "prompt_mask": [0, 0, 1, 1, 1]},
        {"prompt_ids": [1, 2, 3, 0], "prompt_mask": [1, 1, 1, 0]},
        *(
            {
                "completion_ids": [*[0] * left, 4, 5, 6, *[0] * right],
                "completion_mask": [*[0] * left, 1, 1, 1, *[0] * right],
                "tool_mask": [*[0] * left, 1, 0, 1, *[1] * right],
                "logprobs": [*[0.0] * left, -1.0, 0.0, -2.0, *[0.0] * right],
            }
            for left, right in ((2, 0), (0, 2), (1, 1))
        ),
        {
            "prompt_ids": [0, 1, 2, 3],
            "completion_ids": [4, 5, 6, 0],
            "tool_mask": [1, 0, 1, 0],
            "logprobs": [-1.0, 0.0, -2.0, 0.0],
            "attention_mask": [0, 1, 1, 1, 1, 1, 1, 0],
        },
        {name: json.dumps(column) for name, column in ROW.items()},
    ],
)
def test_padding_on_either_side_and_columns_as_text_change_nothing(padded: dict[str, Any]) -> None:
    def read(row: dict[str, Any]) -> Any:
        return import_record(row, "trl", None, Observations(role=TokenRole.ENV_OUTPUT)).segments

    assert read({**ROW, **padded}) == read(ROW)
    assert [segment.token_ids for segment in read(ROW)] == [(1, 2, 3), (4,), (5,), (6,)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ROW, "completion_mask": [1, 0, 1]}, "completion_mask is 0 at position 1 and 1 after it"),
        ({**ROW, "prompt_mask": [1, 0, 1]}, "prompt_mask is 0 at position 1 and 1 after it"),
        ({**ROW, "attention_mask": [1, 1, 1]}, "attention_mask has 3 entries for 3 prompt and 3 completion ids"),
        ({**ROW, "completion_ids": "four, five"}, "completion_ids is str, not a list"),
        ({**ROW, "reward": "good"}, "reward is 'good'; it must be a finite number"),
    ],
)
def test_masks_and_texts_that_say_nothing_are_refused_with_file_and_record(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = Observations(role=TokenRole.ENV_OUTPUT)
    (refusal,) = import_files([tmp_path / "rows.jsonl"], "trl", None, options).refusals
    assert refusal.where == f"{tmp_path / 'rows.jsonl'}:1" and said in refusal.reason


def test_tools_may_be_texts_and_of_another_library() -> None:
    schema = {"type": "object", "properties": {"command": {"type": "string"}}}
    function = {"name": "bash", "description": "Run", "parameters": schema}
    seen: list[Any] = []

    def renderer_of(tools: Any) -> Renderer:
        seen.append([(tool.name, tool.description, tool.parameters) for tool in tools])
        return RENDERER

    for tools in (
        [{"type": "function", "function": function}],
        json.dumps([{"type": "function", "function": function}]),
        [json.dumps({"type": "function", "function": function})],
        [{"type": "function", "function": json.dumps(function)}],
        [{"type": "function", "function": {**function, "parameters": json.dumps(schema)}}],
        [{"name": "bash", "description": "Run", "input_schema": schema}],
        [{"type": "function", **function}],
    ):
        import_record({"messages": PLAIN, "tools": tools}, "chat", renderer_of)
    assert seen == [[("bash", "Run", schema)]] * 7
