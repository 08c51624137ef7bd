"""Calls read and written in every format: what is understood, what is told of what is not, never an exception."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from backtalk.envs.terminal import BASH, SUBMIT
from backtalk.errors import ConfigError, RenderError
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat, detect_format, make_syntax
from backtalk.language.tool_formats.base import Mark, Reply
from backtalk.language.tool_formats.reply import parse_reply, write_reply
from backtalk.language.tool_formats.values import call_problem, parse_value, read_json
from backtalk.messages import Message, ParsedAction, ToolCall, ToolSpec, clean_text
from families import tokenizer_of
from tiny import CHAT_TEMPLATE, tiny_tokenizer

TAGS, HERMES, QWEN3_CODER, LLAMA3_JSON, BASH_BLOCK, PLAIN = ToolFormat
TOOLS = (BASH, SUBMIT)
EDIT = ToolSpec(
    "edit",
    "Change a file.",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "line": {"type": "integer"},
            "scale": {"type": "number"},
            "force": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "options": {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]},
            "mode": {"enum": ["a", "w"]},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["path"],
    },
)
TYPED = (*TOOLS, EDIT)

MARKS = (
    "<tool_call>", "</tool_call>", "<function=bash>", "</function>", "<parameter=command>", "</parameter>",
    "<function=", "<parameter=", '{"name": "bash", "arguments": {"command": "ls"}}',
    '{"name": "bash", "parameters": {}}', "{", "}",
    '"', "\\", "<|python_tag|>", ";", "```", "```bash", "````", "```bash\n", "\n```", "<bash>", "</bash>", "<submit>",
    "</submit>", "<think>", "</think>", "submit", "submit 42", "bash", "\n", "\r\n", " ", "\t", "\x00", "\ud800", "é🙂",
    "NaN", "1e999", "[" * 40, "</", ">",
)  # fmt: skip
HOSTILE_TEXT = st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=6).map("".join)


def parse(tool_format: ToolFormat, text: str, *, tools: tuple[ToolSpec, ...] = TOOLS, **how: Any) -> ParsedAction:
    """Of a format whose marks are plain text to the tokenizer."""
    reply = Reply(text, how.pop("stopped", True), how.pop("opened", False))
    return parse_reply(make_syntax(tool_format, tools), tools, reply, **how)


def arguments(action: ParsedAction) -> list[tuple[str, dict[str, Any]]]:
    return [(call.tool, dict(call.arguments)) for call in action.calls]


def bash(command: str) -> ToolCall:
    return ToolCall("bash", {"command": command})


def written(tool_format: ToolFormat, *commands: str) -> str:
    syntax = make_syntax(tool_format, TOOLS)
    return "\n".join("".join(write_reply(syntax, bash(command))) for command in commands)


def qwen(command: str, tool: str = "bash", argument: str = "command") -> str:
    return f"<tool_call>\n<function={tool}>\n<parameter={argument}>\n{command}\n</parameter>\n</function>\n</tool_call>"


# --- what is understood ---


@pytest.mark.parametrize(
    ("tool_format", "text", "expected"),
    [
        (TAGS, "<bash>ls -la</bash>", ["ls -la"]),
        (TAGS, "<bash></bash>", [""]),
        (TAGS, "I look. <bash>ls</bash> Then I wait.", ["ls"]),
        (TAGS, "<bash>a\n</bash><bash>b</bash>\n<bash> c</bash>", ["a\n", "b", " c"]),
        (TAGS, "</bash><bash>1 < 2 </b></bash>", ["1 < 2 </b>"]),
        (HERMES, '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>', ["ls"]),
        (HERMES, '<tool_call>{"name":"bash","parameters":{"command":"ls"}}</tool_call>', ["ls"]),
        (HERMES, '<tool_call>{"name": "bash", "arguments": {"command": "echo </tool_call>"}}</tool_call>',
         ["echo </tool_call>"]),
        (HERMES, '<tool_call>{"name": "bash", "arguments": {"command": "\\ud800\\u00e9"}}</tool_call>', ["\ufffdé"]),
        (HERMES, '<tool_call>{"name": "bash", "arguments": {"command": "a"}}</tool_call>'
         '<tool_call>{"name": "bash", "arguments": {"command": "b"}}</tool_call>', ["a", "b"]),
        (QWEN3_CODER, qwen("ls -la"), ["ls -la"]),
        (QWEN3_CODER, qwen("\n ls\n"), ["\n ls\n"]),  # one line end at each edge is the format's
        (QWEN3_CODER, qwen(""), [""]),
        (QWEN3_CODER, qwen("</tool_call></function><parameter=x> <tool_call>"),
         ["</tool_call></function><parameter=x> <tool_call>"]),
        (QWEN3_CODER, "<tool_call><function= bash ><parameter=command >ls</parameter></function></tool_call>", ["ls"]),
        (QWEN3_CODER, qwen("a") + "\n" + qwen("b"), ["a", "b"]),
        (LLAMA3_JSON, '{"name": "bash", "parameters": {"command": "ls"}}', ["ls"]),
        (LLAMA3_JSON, '<|python_tag|>{"name": "bash", "arguments": {"command": "ls"}}', ["ls"]),
        (LLAMA3_JSON, '{"name": "bash", "parameters": {"command": "a; {\\"b"}}; {"name": "bash", "parameters": '
         '{"command": "b"}}\n{"name": "bash", "parameters": {"command": "c"}}', ['a; {"b', "b", "c"]),
        (LLAMA3_JSON, 'An array {"is": "prose"}.\n\n{"name": "bash", "parameters": {"command": "ls"}}', ["ls"]),
        (LLAMA3_JSON, '{"type": "function", "name": "bash", "parameters": {"command": "ls"}}', ["ls"]),
        (BASH_BLOCK, "```bash\nls -la\n```", ["ls -la"]),
        (BASH_BLOCK, "I look.\n\n```sh\nls\n\n```\n", ["ls\n"]),
        (BASH_BLOCK, "```shell\n```", [""]),
        (BASH_BLOCK, "````bash\ncat <<E\n```\nE\n````", ["cat <<E\n```\nE"]),
        (BASH_BLOCK, "```python\nprint(1)\n```\nso\n```bash\r\nls\n```\n```bash\npwd\n```", ["ls", "pwd"]),
        (PLAIN, "ls -la", ["ls -la"]),
        (PLAIN, " cat <<E\n<bash>\nE\n", [" cat <<E\n<bash>\nE\n"]),
        (PLAIN, "submitted=1", ["submitted=1"]),
    ],
)  # fmt: skip
def test_calls_are_read_in_order(tool_format: ToolFormat, text: str, expected: list[str]) -> None:
    action = parse(tool_format, text, max_calls=9)
    assert [(call.tool, call.arguments["command"]) for call in action.calls] == [("bash", c) for c in expected]
    assert (action.error, action.text) == (None, text)


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (TAGS, "<submit> 42\n</submit>"),
        (QWEN3_CODER, qwen(" 42\n", "submit", "answer")),
        (BASH_BLOCK, "```submit\n 42\n\n```"),
        (PLAIN, "submit  42\n"),
    ],
)
def test_submitting(tool_format: ToolFormat, text: str) -> None:
    assert arguments(parse(tool_format, text)) == [("submit", {"answer": " 42\n"})]


def test_submitting_nothing_in_plain() -> None:
    for text in ("submit", "submit "):
        assert arguments(parse(PLAIN, text)) == [("submit", {"answer": ""})]


def test_values_of_bare_text_have_the_types_of_the_schema() -> None:
    pairs = {"path": "007", "line": " 7", "scale": "1.5", "force": "True", "tags": '["a", "b"]', "options":
             '{"deep": false}', "mode": "w", "limit": "None"}  # fmt: skip
    body = "".join(f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in pairs.items())
    action = parse(QWEN3_CODER, f"<tool_call>\n<function=edit>\n{body}</function>\n</tool_call>", tools=TYPED)
    assert arguments(action) == [
        ("edit", {"path": "007", "line": 7, "scale": 1.5, "force": True, "tags": ["a", "b"], "options": {"deep": False},
                  "mode": "w", "limit": None})
    ]  # fmt: skip
    assert parse_value("7 8", {"type": "integer"}) == "7 8"  # which the check refuses
    assert parse_value("null", {"type": ["string", "null"]}) == "null"
    assert parse_value("[1]", {}) == "[1]"


# --- what is said about what is not ---

HERMES_SHAPE = '<tool_call>\n{"name": "bash", "arguments": {"command": "..."}}\n</tool_call>'
LLAMA_SHAPE = '{"name": "bash", "parameters": {"command": "..."}}'
QWEN_SHAPE = qwen("...")


@pytest.mark.parametrize(
    ("tool_format", "text", "stopped", "error"),
    [
        (TAGS, "", True, "[no tool call; write <bash>...</bash>]"),
        (TAGS, "ls", False, "[cut at the token limit before a tool call; write <bash>...</bash>]"),
        (TAGS, "<bash>ls", True, "[<bash> was not closed with </bash>]"),
        (TAGS, "<bash>ls", False, "[cut at the token limit before </bash>]"),
        (TAGS, "<bash>ls</submit>", True, "[<bash> is followed by </submit>; close it with </bash>]"),
        (TAGS, "<bash><bash>ls</bash>", True, "[<bash> is followed by <bash>; close it with </bash>]"),
        (HERMES, "plain words", True, f"[no tool call; write {HERMES_SHAPE}]"),
        (HERMES, "<tool_call>", False, "[cut at the token limit before </tool_call>]"),
        (HERMES, '<tool_call>{"name": "ba', False, "[cut at the token limit before </tool_call>]"),
        (HERMES, '<tool_call>{"name": "ba', True,
         "[the tool call is not valid JSON: unterminated string starting at character 9, "
         f"'\"ba'; write {HERMES_SHAPE}]"),
        (HERMES, "<tool_call>", True,
         f"[the tool call is not valid JSON: expecting value at its end; write {HERMES_SHAPE}]"),
        (HERMES, "<tool_call>{bash: ls}</tool_call>", False,
         "[the tool call is not valid JSON: expecting property name enclosed in double quotes at character 1, "
         f"'bash: ls}}</tool_call>'; write {HERMES_SHAPE}]"),
        (HERMES, '<tool_call>{"name": "bash", "arguments": {"command": "a\nb"}}</tool_call>', True,
         "[the tool call is not valid JSON: invalid control character at character 44, '\\nb\"}}</tool_call>'; "
         f"a line end in a string is written \\n; write {HERMES_SHAPE}]"),
        (HERMES, '<tool_call>["bash"]</tool_call>', True,
         f"[the tool call has no \"name\", got '[\"bash\"]</tool_call>'; write {HERMES_SHAPE}]"),
        (HERMES, '<tool_call>{"name": "bash", "arguments": "ls"}</tool_call>', True,
         f'[the "arguments" of the tool call are not a JSON object; write {HERMES_SHAPE}]'),
        (HERMES, '<tool_call>{"name": "bash", "arguments": {"command": "ls"}} please</tool_call>', True,
         "[the JSON of the tool call is followed by 'please</tool_call>', not by </tool_call>]"),
        (QWEN3_CODER, "ls", True, f"[no tool call; write {QWEN_SHAPE}]"),
        (QWEN3_CODER, '<tool_call>{"name": 1}</tool_call>', True,
         "[expected <function=...> at character 11 of the reply, got '{\"name\": 1}</tool_call>'; write\n"
         f"{QWEN_SHAPE}]"),
        (QWEN3_CODER, "<function=bash", True, "['<function=bash' has no '>' after its name]"),
        (QWEN3_CODER, "<function=ba", False, "[cut at the token limit before </function>]"),
        (QWEN3_CODER, "<function=bash>\n<param", False, "[cut at the token limit before </function>]"),
        (QWEN3_CODER, "<function=bash>\n<parameter=command>\nls", False,
         "[cut at the token limit before </parameter>]"),
        (QWEN3_CODER, "<function=bash>\n<parameter=command>\nls", True,
         "[<parameter=command> was not closed with </parameter>]"),
        (QWEN3_CODER, "<function=bash>\n<parameter=command>\nls\n</parameter> so", True,
         "[expected <parameter=...> or </function> at character 52 of the reply, got 'so'; write\n"
         f"{QWEN_SHAPE}]"),
        (QWEN3_CODER, "<function=bash><parameter=command>a</parameter><parameter=command>b</parameter></function>",
         True, "[the parameter 'command' comes twice in one call; write each once]"),
        (LLAMA3_JSON, "hello", True, f"[no tool call; write {LLAMA_SHAPE}]"),
        (LLAMA3_JSON, '{"name": "bash", "par', False, "[cut at the token limit before the tool call was closed]"),
        (LLAMA3_JSON, "<|python_tag|>print(1)", True,
         f"[the tool call is not valid JSON: expecting value at character 0, 'print(1)'; write {LLAMA_SHAPE}]"),
        (BASH_BLOCK, "```\nls\n```", True, "[no tool call; write ```bash\n...\n```]"),
        (BASH_BLOCK, "```bash ls```", True, "[no tool call; write ```bash\n...\n```]"),
        (BASH_BLOCK, "````bash\nls\n```", True, "[````bash was not closed with ````]"),
        (BASH_BLOCK, "```bash\nls", False, "[cut at the token limit before ```]"),
        (PLAIN, " \n", True, "[no tool call; write a command or submit ...]"),
        (PLAIN, "rm -rf /tmp/x", False,
         "[cut at the token limit, and a command is run only whole, got 'rm -rf /tmp/x']"),
    ],
)  # fmt: skip
def test_the_policy_is_told_what_was_wrong(tool_format: ToolFormat, text: str, stopped: bool, error: str) -> None:
    assert parse(tool_format, text, stopped=stopped) == ParsedAction(text, (), error)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "it is nested deeper than 32 levels"),
        ("[" * 40 + "]" * 40, "it is nested deeper than 32 levels"),
        ('{"a": ' * 500 + "1" + "}" * 500, "it is nested deeper than 32 levels"),
        ("9" * 100_000, r"the number 99999999\.\.\. has 100000 digits, at most 400 are read"),
        ("-" + "9" * 5000 + ".5", "is too large"),
        ("1e999", "the number 1e999 is too large"),
        ("NaN", "NaN is not a JSON value"),
        ("[-Infinity]", "-Infinity is not a JSON value"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' comes twice in one object"),
        ('{"a": {"\\ud800": 1, "\\ud800": 3}}', "comes twice"),
        ("{'a': 1}", "expecting property name enclosed in double quotes at character 1"),
        ("", "expecting value at its end"),
        ('"\x00"', r"invalid control character at character 1.*; a line end in a string is written \\n"),
    ],
)
def test_adversarial_json(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_json(text)
    for tool_format, inside in product((HERMES, LLAMA3_JSON), (text, f'{{"name": "bash", "arguments": {text}')):
        opening = "<tool_call>" if tool_format is HERMES else "<|python_tag|>"
        error = parse(tool_format, opening + inside).error
        assert error is not None and error.startswith("[the tool call is not valid JSON: ") and len(error) < 400


def test_json_is_read_up_to_its_end() -> None:
    assert read_json('x{"a": [1, 2.5, true, null, "\\u00e9"]} and so on', 1) == ({"a": [1, 2.5, True, None, "é"]}, 38)
    assert read_json("1" * 400) == (int("1" * 400), 400)
    assert read_json('{"\\ud800": "\\udfff"}') == ({"\ufffd": "\ufffd"}, 20)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (ToolCall("bash", {"command": "ls"}), None),
        (ToolCall("python", {}), "there is no tool 'python'; the tools are bash, submit and edit"),
        (ToolCall("bash", {}), "bash needs the argument 'command', got none"),
        (ToolCall("bash", {"cmd": "ls"}), "bash needs the argument 'command', got 'cmd'"),
        (ToolCall("bash", {"command": "ls", "timeout": 3}), "bash takes no argument 'timeout'; it takes 'command'"),
        (ToolCall("bash", {"command": 42}), "the argument 'command' of bash has to be a string, got the number 42"),
        (ToolCall("bash", {"command": ["ls"]}), "the argument 'command' of bash has to be a string, got an array of 1"),
        (ToolCall("bash", {"command": None}), "the argument 'command' of bash has to be a string, got null"),
        (ToolCall("edit", {"path": "a", "line": 3.0, "scale": 2, "limit": None, "mode": "w"}), None),
        (ToolCall("edit", {"path": "a", "line": True}),
         "the argument 'line' of edit has to be an integer, got true"),
        (ToolCall("edit", {"path": "a", "line": 2.5}),
         "the argument 'line' of edit has to be an integer, got the number 2.5"),
        (ToolCall("edit", {"path": "a", "force": "yes"}),
         "the argument 'force' of edit has to be a boolean, got the text 'yes'"),
        (ToolCall("edit", {"path": "a", "tags": ["a", 1]}),
         "the argument 'tags' of edit at item 1 has to be a string, got the number 1"),
        (ToolCall("edit", {"path": "a", "options": {}}), "the argument 'options' of edit needs the key 'deep'"),
        (ToolCall("edit", {"path": "a", "options": {"deep": {}}}),
         "the argument 'options' of edit at key 'deep' has to be a boolean, got an object"),
        (ToolCall("edit", {"path": "a", "mode": "x"}),
         "the argument 'mode' of edit has to be one of 'a, w', got the text 'x'"),
        (ToolCall("edit", {"path": "a", "limit": "3"}),
         "the argument 'limit' of edit has to be an integer or null, got the text '3'"),
    ],
)  # fmt: skip
def test_a_call_has_to_fit_its_tool(call: ToolCall, wrong: str | None) -> None:
    assert call_problem(call, TYPED) == wrong


def test_what_does_not_fit_is_told_with_an_example_of_that_tool() -> None:
    text = '<tool_call>{"name": "submit", "arguments": {"command": "ls"}}</tool_call>'
    shape = '<tool_call>\n{"name": "submit", "arguments": {"answer": "..."}}\n</tool_call>'
    error = f"[submit needs the argument 'answer', got 'command'; write {shape}]"
    assert parse(HERMES, text) == ParsedAction(text, (), error)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"properties": 3},
        {"type": "object", "required": "x"},
        {"required": [3, "x"]},
        {"properties": {"x": True}},
        {"properties": {"x": {"type": 3, "anyOf": 5}}},
        {"additionalProperties": {"type": 1}},
    ],
)
def test_odd_schemas_break_nothing(odd: dict[str, Any]) -> None:
    tools = (ToolSpec("odd", "", odd),)
    for tool_format in (HERMES, QWEN3_CODER, LLAMA3_JSON):
        syntax = make_syntax(tool_format, tools)
        assert "odd" in syntax.instructions("one call")
        pieces = write_reply(syntax, ToolCall("odd", {"x": "1"}))
        action = parse_reply(syntax, tools, Reply("".join(pieces)))
        assert action.calls or action.error


# --- several calls ---


@pytest.mark.parametrize("tool_format", [TAGS, HERMES, QWEN3_CODER, LLAMA3_JSON, BASH_BLOCK])
def test_only_so_many_calls_are_run_and_the_policy_is_told(tool_format: ToolFormat) -> None:
    text = written(tool_format, "a", "b", "c")
    first = parse(tool_format, text)
    assert [call.arguments["command"] for call in first.calls] == ["a"]
    assert first.notice == "[only the first call was run; write one call in each reply]\n"
    assert first.warnings == ("only the first call was run; write one call in each reply",)
    two = parse(tool_format, text, max_calls=2)
    assert [call.arguments["command"] for call in two.calls] == ["a", "b"]
    assert two.notice == "[only the first 2 calls were run; write at most 2 calls in each reply]\n"
    three = parse(tool_format, text, max_calls=3, report_warnings=True)
    assert [call.arguments["command"] for call in three.calls] == ["a", "b", "c"]
    assert (three.notice, three.warnings) == ("", ())


def test_calls_end_at_the_first_that_cannot_be_run() -> None:
    good, bad = (
        f'<tool_call>{{"name": "{name}", "arguments": {{"command": "ls"}}}}</tool_call>' for name in ("bash", "py")
    )
    assert parse(HERMES, bad + good).calls == ()
    action = parse(HERMES, good + bad + good, max_calls=3)
    assert action.calls == (bash("ls"),)
    assert action.notice == (
        "[what follows call 1 was not run: there is no tool 'py'; the tools are bash and submit; "
        f"write {HERMES_SHAPE}]\n"
    )
    assert action.warnings == (action.notice[1:-2],)
    broken = parse(HERMES, good + "<tool_call>{]</tool_call>", max_calls=3)
    assert broken.calls == (bash("ls"),) and "what follows call 1 was not run: the tool call is not" in broken.notice
    assert parse(HERMES, good + bad).notice == "[only the first call was run; write one call in each reply]\n"
    assert (
        parse(HERMES, good + "<tool_call>{]").notice == "[only the first call was run; write one call in each reply]\n"
    )


# --- thinking and faults of form ---


@pytest.mark.parametrize("tool_format", ToolFormat)
def test_a_call_inside_thinking_is_no_call(tool_format: ToolFormat) -> None:
    call, other = written(tool_format, "ls"), written(tool_format, "rm")
    closed = f"<think>\nmaybe {other}\n</think>\n\n"
    action = parse(tool_format, closed + call, thinking=True)
    assert (action.calls, action.warnings) == ((bash("ls"),), ())
    opened = parse(tool_format, closed.removeprefix("<think>") + call, opened=True, thinking=True)
    assert (opened.calls, opened.warnings) == ((bash("ls"),), ())
    for text, how in ((f"<think>{call}", {}), (call, {"opened": True})):
        assert parse(tool_format, text, **how).error == "[<think> was not closed with </think>]"
        assert parse(tool_format, text, stopped=False, **how).error == "[cut at the token limit before </think>]"
    assert parse(tool_format, closed).calls == ()


OUTSIDE, MISSING = "text outside the call", "no <think>...</think> before the call"


@pytest.mark.parametrize(
    ("tool_format", "text", "how", "warnings"),
    [
        (HERMES, "{call}", {}, []),
        (HERMES, "\n {call}\n", {}, []),
        (HERMES, "So: {call}", {}, [OUTSIDE]),
        (HERMES, "{call} so", {}, [OUTSIDE]),
        (HERMES, "{call}", {"thinking": True}, [MISSING]),
        (HERMES, "<think></think>{call}", {"thinking": True}, []),
        (HERMES, "<think>a</think><think>b</think>{call}", {}, ["more than one <think>...</think>"]),
        (HERMES, "<think>a<think>b</think>{call}", {}, ["<think> inside <think>"]),
        (HERMES, "a</think>{call}", {}, ["</think> without <think>", OUTSIDE]),
        (HERMES, "{call}<think>b", {}, ["<think> was not closed with </think>"]),
        (HERMES, "{call[:-12]}", {}, ["<tool_call> was not closed with </tool_call>"]),
        (HERMES, "{call[:-5]}", {}, ["<tool_call> was not closed with </tool_call>"]),
        (QWEN3_CODER, "{call[:-12]}", {}, ["<tool_call> was not closed with </tool_call>"]),
        (QWEN3_CODER, "{call[11:]}", {}, ["<function=...> without <tool_call>"]),
        (QWEN3_CODER, "{call[:-24]}", {}, ["<function=...> was not closed with </function>",
                                           "<tool_call> was not closed with </tool_call>"]),
        (QWEN3_CODER, "{call}\nso", {}, [OUTSIDE]),
        (LLAMA3_JSON, "{call};", {}, []),
        (LLAMA3_JSON, "Well.\n{call}", {}, [OUTSIDE]),
        (BASH_BLOCK, "I look.\n{call}", {}, []),
        (BASH_BLOCK, "{call}\nDone.", {}, [OUTSIDE]),
        (TAGS, "{call}</bash>", {}, [OUTSIDE]),
        (PLAIN, "{call}", {"thinking": True}, [MISSING]),
    ],
)  # fmt: skip
def test_faults_of_form_are_counted_and_told_where_asked(
    tool_format: ToolFormat, text: str, how: dict[str, Any], warnings: list[str]
) -> None:
    call = written(tool_format, "ls")
    text = re.sub(r"\{call(?:\[(-?\d*):(-?\d*)\])?\}",
                  lambda m: call[int(m[1]) if m[1] else None : int(m[2]) if m[2] else None], text)  # fmt: skip
    quiet = parse(tool_format, text, **how)
    assert (quiet.calls, quiet.warnings, quiet.notice) == ((bash("ls"),), tuple(warnings), "")
    told = parse(tool_format, text, report_warnings=True, **how)
    assert told.notice == "".join(f"[{warning}]\n" for warning in warnings)


# --- properties ---


def can_hold(tool_format: ToolFormat, text: str) -> bool:
    """What docs/tool_formats.md promises of a command."""
    match tool_format:
        case ToolFormat.TAGS:
            return re.search("</?(bash|submit)>", text) is None
        case ToolFormat.QWEN3_CODER:
            return "</parameter>" not in text
        case ToolFormat.PLAIN:
            starts = re.match(r"submit(\s|\Z)", text) or text.lstrip().startswith("<think>")
            return bool(text.strip()) and not starts
        case _:
            return True


@pytest.mark.parametrize("tool_format", ToolFormat)
@settings(max_examples=150, deadline=None)
@given(HOSTILE_TEXT)
@example("".join(MARKS))
@example("\n".join(MARKS))
@example("")
@example("\n```\n````\n```bash")
@example("<think>x</think>ls")
def test_a_written_call_is_read_back_or_refused(tool_format: ToolFormat, command: str) -> None:
    syntax = make_syntax(tool_format, TOOLS)
    if not can_hold(tool_format, clean_text(command)):
        with pytest.raises(RenderError, match=r"(?s)cannot be written in this format: .*hermes"):
            write_reply(syntax, bash(command))
        return
    text = clean_text("".join(write_reply(syntax, bash(command))))
    assert parse(tool_format, text) == ParsedAction(text, (bash(clean_text(command)),))
    for opened in (False, True):
        pieces = write_reply(syntax, bash(command), "I think.", opened=opened, thinking=True)
        text = clean_text("".join(pieces))
        assert parse(tool_format, text, opened=opened, thinking=True).calls == (bash(clean_text(command)),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NO_PARAMETER = HOSTILE_TEXT.map(clean_text).filter(lambda text: "</parameter>" not in text)


@pytest.mark.parametrize("tool_format", [HERMES, LLAMA3_JSON])
@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=5).map(clean_text), JSON, max_size=4))
def test_json_formats_hold_any_value(tool_format: ToolFormat, values: dict[str, Any]) -> None:
    tools = (ToolSpec("any", "", {"type": "object"}),)
    pieces = write_reply(make_syntax(tool_format, tools), ToolCall("any", values))
    (call,) = parse(tool_format, clean_text("".join(pieces)), tools=tools).calls
    assert call.arguments == json.loads(clean_text(json.dumps(values, ensure_ascii=False)))


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {"path": NO_PARAMETER},
        optional={
            "line": st.integers(),
            "scale": st.floats(allow_nan=False, allow_infinity=False),
            "force": st.booleans(),
            "tags": st.lists(NO_PARAMETER, max_size=3),
            "options": st.fixed_dictionaries({"deep": st.booleans()}),
            "mode": st.sampled_from(["a", "w"]),
            "limit": st.none() | st.integers(),
        },
    )
)
def test_qwen3_coder_holds_typed_values(values: dict[str, Any]) -> None:
    pieces = write_reply(make_syntax(QWEN3_CODER, TYPED), ToolCall("edit", values))
    assert parse(QWEN3_CODER, "".join(pieces), tools=TYPED).calls == (ToolCall("edit", values),)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A well-written call with pieces cut out and marks put in."""
    tool_format = draw(st.sampled_from([f for f in ToolFormat if f is not PLAIN]))
    text = written(tool_format, *draw(st.lists(st.sampled_from(["ls", "a\nb"]), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        start, width = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
        text = text[:start] + draw(st.sampled_from(("", *MARKS))) + text[start + width :]
    return text


@pytest.mark.parametrize("tool_format", ToolFormat)
@settings(max_examples=150, deadline=None)
@given(text=HOSTILE_TEXT | damaged(), stopped=st.booleans(), opened=st.booleans(), max_calls=st.integers(1, 3))
def test_no_text_breaks_a_parser(
    tool_format: ToolFormat, text: str, stopped: bool, opened: bool, max_calls: int
) -> None:
    action = parse(tool_format, text, stopped=stopped, opened=opened, max_calls=max_calls, report_warnings=True)
    assert (action.error is None) == bool(action.calls)
    assert len(action.calls) <= max_calls
    assert all(call.tool in ("bash", "submit") and len(call.arguments) == 1 for call in action.calls)
    assert bool(action.notice) == bool(action.warnings)
    assert len(action.notice) + len(action.error or "") < 1500


@pytest.mark.parametrize("tool_format", ToolFormat)
def test_long_replies_of_one_mark_take_no_time(tool_format: ToolFormat) -> None:
    for mark in MARKS:
        action = parse(tool_format, mark * 20_000, max_calls=99)
        assert action.calls or action.error


# --- tokens ---


def with_marks(*marks: str, template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer.chat_template = template
    return tokenizer


@cache
def renderer(tool_format: ToolFormat, *, tokens: bool) -> Renderer:
    marks = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>") if tokens else ()
    return Renderer(with_marks(*marks), TOOLS, RendererConfig(tool_format=tool_format))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("tool_format", ToolFormat)
@settings(max_examples=40, deadline=None)
@given(HOSTILE_TEXT)
def test_written_ids_are_read_back(tool_format: ToolFormat, tokens: bool, command: str) -> None:
    r = renderer(tool_format, tokens=tokens)
    if tool_format is not TAGS and not can_hold(tool_format, clean_text(command)):
        return
    ids = r.encode_action(bash(command))  # tags are tokens of this tokenizer, so they hold any text
    action = r.parse_action(ids, True)
    assert (action.calls, action.warnings) == ((bash(clean_text(command)),), ())
    assert ids[-1] == r.end_of_turn_id


@pytest.mark.parametrize("tool_format", ToolFormat)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_ids_break_a_parser(tool_format: ToolFormat, data: st.DataObject) -> None:
    r = renderer(tool_format, tokens=True)
    some = st.sampled_from(sorted(r.encoder.control_ids.values())) | st.integers(0, len(r.tokenizer.get_vocab()) + 99)  # type: ignore[attr-defined]
    action = r.parse_action(data.draw(st.lists(some, max_size=30)), data.draw(st.booleans()))
    assert (action.error is None) == bool(action.calls)


def test_spelled_out_tags_are_text_where_tags_are_tokens_and_other_marks_count_either_way() -> None:
    r = renderer(TAGS, tokens=False)
    spelled = tuple(r._encode(["<bash>ls</bash>"]))
    assert r.parse_action(spelled, True).error == "[no tool call; write <bash>...</bash>]"
    assert r.parse_action(r.encode_text("<bash>echo '</submit>'</bash>"), True).error is not None
    quoted = r.encode_action(bash("echo '</submit>' </bash>"))
    assert r.parse_action(quoted, True).calls == (bash("echo '</submit>' </bash>"),)
    r = renderer(HERMES, tokens=True)
    text = written(HERMES, "ls")
    spelled, tokens = tuple(r._encode([text])), r.encode_text(text)
    assert len(spelled) > len(tokens)
    assert r.parse_action(spelled, True) == r.parse_action(tokens, True) == ParsedAction(text, (bash("ls"),))


# --- which format ---


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        ("", ("<bash>", "</bash>", "<submit>", "</submit>", "<tool_call>"), TAGS),
        ("", ("<bash>", "</bash>", "<submit>"), HERMES),
        ("<tool_call>\n<function=example>\n<parameter=x>", ("<tool_call>",), QWEN3_CODER),
        ('{"name": function name, "parameters": ...}', ("<|start_header_id|>", "<|eot_id|>"), LLAMA3_JSON),
        ("<tool_call>\n{{ tool | tojson }}", ("<tool_call>", "</tool_call>"), HERMES),
        ("", (), HERMES),
    ],
)
def test_the_format_is_the_one_a_model_was_made_for(
    template: str, tokens: tuple[str, ...], expected: ToolFormat
) -> None:
    assert detect_format(template, tokens, TOOLS) is expected


@pytest.mark.parametrize(
    ("family", "expected", "end"),
    [
        ("qwen2_5", HERMES, "<|im_end|>"),
        ("qwen3", HERMES, "<|im_end|>"),
        ("qwen3_5_think", QWEN3_CODER, "<|im_end|>"),
        ("llama3_1", LLAMA3_JSON, "<|eot_id|>"),
        ("llama3_2", LLAMA3_JSON, "<|eot_id|>"),
    ],
)
def test_a_family_is_read_as_its_own_template_writes(family: str, expected: ToolFormat, end: str) -> None:
    tokenizer = tokenizer_of(family)
    r = Renderer(tokenizer, TYPED, RendererConfig(on_drift="fork"))
    assert r.tool_format is expected
    taught = "".join(r.encoder.decode(s.token_ids) for s in r.render_prompt([Message("user", ())]))
    assert taught.count("Run a bash command.") == 1  # by the template, not by us a second time
    call = ToolCall("edit", {"path": "a b", "line": 7, "force": True, "tags": ["x"], "options": {"deep": False}})
    function = {"name": call.tool, "arguments": dict(call.arguments)}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "X"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert isinstance(whole, str)
    body = whole[whole.rindex("assistant") :].removesuffix("\n").removesuffix(end)
    body = re.sub(r"\Aassistant(<\|end_header_id\|>)?\n+", "", body)
    assert r.parse_action(r.encode_text(body), True).calls == (call,)
    ours = r.encoder.decode(r.encode_action(call)[:-1])
    assert ours.replace("true", "True") == body.removeprefix("<think>\n\n</think>\n\n").replace("true", "True")


def test_tools_have_to_fit_the_format() -> None:
    for tool_format in (TAGS, BASH_BLOCK, PLAIN):
        with pytest.raises(ConfigError, match=r"tool 'edit' takes 8 arguments .* use tool_format='hermes'"):
            make_syntax(tool_format, TYPED)
    for tool_format in (BASH_BLOCK, PLAIN):
        with pytest.raises(ConfigError, match=r"\['submit'\] has an argument named 'command'"):
            make_syntax(tool_format, (SUBMIT,))


@pytest.mark.parametrize("tool_format", ToolFormat)
def test_instructions_name_every_tool_and_show_a_call_that_is_one(tool_format: ToolFormat) -> None:
    syntax = make_syntax(tool_format, TOOLS)
    said = syntax.instructions("at most 3 calls")
    assert SUBMIT.description in said and "submit" in said
    assert (BASH.description in said and "at most 3 calls in each reply" in said) != (tool_format is PLAIN)
    if tool_format is not PLAIN:
        assert "".join(write_reply(syntax, bash("..."))) in said


def test_calls_that_json_cannot_hold_are_refused() -> None:
    for value in (float("nan"), {1, 2}, b"x"):
        with pytest.raises(RenderError, match="cannot be written in this format"):
            write_reply(make_syntax(HERMES, TOOLS), ToolCall("bash", {"command": value}))
    with pytest.raises(RenderError, match="another call"):
        write_reply(make_syntax(QWEN3_CODER, TOOLS), ToolCall("ba sh ", {"command": "ls"}))
    with pytest.raises(RenderError):
        write_reply(make_syntax(TAGS, TOOLS), ToolCall("bash", {"a": "1", "b": "2"}))
    assert isinstance(write_reply(make_syntax(TAGS, TOOLS), bash("ls"))[0], Mark)
