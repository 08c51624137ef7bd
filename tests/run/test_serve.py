"""The endpoint: a real server on loopback over a tiny real model, and what it remembers."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from backtalk.cli.app import app
from backtalk.errors import ConfigError
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.rollout.sampler import SamplingParams, ScriptedSampler
from backtalk.run.serve import Endpoint, listen
from tiny import tiny_model_dir, tiny_tokenizer

USER = {"role": "user", "content": "Say it"}
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
CALL = "<bash>ls</bash>"


def scripted(*replies: str, max_tokens: int = 500, calls: int = 1) -> Endpoint:
    config = RendererConfig(tool_format=ToolFormat.TAGS, max_calls_per_turn=calls)
    renderer = Renderer(tiny_tokenizer(), (), config)
    asked = iter(replies)
    return Endpoint(
        renderer,
        lambda params: ScriptedSampler(lambda key: [next(asked)], renderer.encode_text),
        SamplingParams(max_tokens=100),
        max_tokens=max_tokens,
    )


async def test_a_conversation_that_grows_is_continued_from_the_sampled_ids() -> None:
    endpoint = scripted("one", "two", "three")
    first = await endpoint.complete({"messages": [USER]})
    reply = first["choices"][0]["message"]
    assert reply == {"role": "assistant", "content": "one"}
    second = await endpoint.complete(
        {"messages": [USER, {**reply, "refusal": None}, {"role": "user", "content": "on"}]}
    )
    held = first["prompt_token_ids"] + first["choices"][0]["token_ids"]
    assert second["prompt_token_ids"][: len(held)] == held
    assert second["usage"]["prompt_tokens"] == len(second["prompt_token_ids"]) > len(held)
    # What somebody else said in the policy's name is rendered; the text is the same, so here the ids are too.
    told = [USER, {"role": "assistant", "content": "one"}, {"role": "user", "content": "on"}]
    fresh = scripted("three")
    assert (await fresh.complete({"messages": told}))["prompt_token_ids"] == second["prompt_token_ids"]


async def test_calls_are_told_as_calls_and_remembered() -> None:
    endpoint = scripted(CALL, "done")
    first = await endpoint.complete({"messages": [USER], "tools": [TOOL]})
    (choice,) = first["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "bash")
    assert json.loads(call["function"]["arguments"]) == {"command": "ls"}
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "a.txt"}
    second = await endpoint.complete({"messages": [USER, choice["message"], answer], "tools": [TOOL]})
    held = first["prompt_token_ids"] + choice["token_ids"]
    assert second["prompt_token_ids"][: len(held)] == held
    plain = await scripted(CALL).complete({"messages": [USER]})
    assert plain["choices"][0]["message"] == {"role": "assistant", "content": CALL}  # nobody offered a tool


def prompt_text(answer: dict[str, Any]) -> str:
    return str(tiny_tokenizer().decode(answer["prompt_token_ids"]))


def call_of(command: str, **changes: Any) -> dict[str, Any]:
    function = {"name": "bash", "arguments": json.dumps({"command": command})}
    return {"id": "c", "type": "function", "function": function | changes}


def told(*calls: dict[str, Any], content: str | None = None) -> list[dict[str, Any]]:
    assistant = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return [USER, assistant, {"role": "tool", "tool_call_id": "c", "content": "a.txt"}]


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (call_of("ls"), "<bash>ls</bash>"),
        (call_of("ls", parsed_arguments=None, strict=True), "<bash>ls</bash>"),
        (call_of("ls", arguments='{ "command":\n"\\u006cs" }'), "<bash>ls</bash>"),
        (call_of("ls", arguments={"command": "ls"}), "<bash>ls</bash>"),
        (call_of("ls", arguments={"command": 7}), 'bash {"command": 7}'),  # what tags cannot hold is spelled out
        (call_of("ls", name="fly"), 'fly {"command": "ls"}'),
        (call_of("ls", arguments="{broken"), "bash {broken"),
    ],
)
async def test_a_history_that_is_not_known_is_rendered_with_its_calls(call: dict[str, Any], shown: str) -> None:
    answer = await scripted("x").complete({"messages": told(call), "tools": [TOOL]})
    assert f"assistant\n{shown}<|im_end|>" in prompt_text(answer)


async def test_a_changed_call_is_not_taken_for_the_one_that_was_sampled() -> None:
    endpoint = scripted(f"{CALL}\n<bash>pwd</bash>", "x", "y", calls=2)
    message = (await endpoint.complete({"messages": [USER], "tools": [TOOL]}))["choices"][0]["message"]
    first, second = message["tool_calls"]
    same = await endpoint.complete({"messages": told(first, second), "tools": [TOOL]})
    changed = await endpoint.complete({"messages": told(first, call_of("id")), "tools": [TOOL]})
    assert "<bash>ls</bash>\n<bash>pwd</bash><|im_end|>" in prompt_text(same)
    assert "<bash>ls</bash>\n<bash>id</bash><|im_end|>" in prompt_text(changed)


async def test_the_id_of_a_call_tells_which_of_several_equal_replies_it_was() -> None:
    """As where an agent plays one task several times at once."""
    endpoint = scripted(f"first {CALL}", f"second {CALL}", "x", "y", "z")
    asked = {"messages": [USER], "tools": [TOOL]}
    one, two = [(await endpoint.complete(asked))["choices"][0]["message"]["tool_calls"][0] for _ in range(2)]
    assert one["id"] != two["id"]
    shown = [
        prompt_text(await endpoint.complete({**asked, "messages": told(call)})) for call in (one, two, call_of("ls"))
    ]
    assert ["first <bash>" in shown[0], "second <bash>" in shown[1], "second <bash>" in shown[2]] == [True] * 3


async def test_numbers_and_white_space_may_be_written_anew() -> None:
    add = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}
    endpoint = scripted("<add>1.0</add>", "x")
    message = (await endpoint.complete({"messages": [USER], "tools": [add]}))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": 1.0}'
    written = told(call_of("", name="add", arguments='{"a":1}'))
    assert "<add>1.0</add>" in prompt_text(await endpoint.complete({"messages": written, "tools": [add]}))


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def replied(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        (
            [{"role": "developer", "content": "Be brief."}, USER],
            "system\nBe brief.<|im_end|>\n<|im_start|>user\nSay it",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "it"}]}],
            "user\nSay it",
        ),
        ([USER, {"role": "tool", "content": "early"}], "user\nSay it<|im_end|>\n<|im_start|>tool\nearly<|im_end|>"),
        (
            [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}],
                },
                USER,
            ],
            "assistant\na<|im_end|>\n<|im_start|>user\nSay it",
        ),
        ([{"role": "assistant", "content": "Hello."}, USER], "assistant\nHello.<|im_end|>\n<|im_start|>user\nSay it"),
        (
            [
                USER,
                {"role": "assistant", "content": "So."},
                {"role": "assistant", "content": None, "tool_calls": [call_of("ls")]},
                USER,
            ],
            "assistant\nSo.\n<bash>ls</bash><|im_end|>",
        ),
        (
            [USER, {"role": "assistant", "content": None, "function_call": call_of("ls")["function"]}, USER],
            "<bash>ls</bash>",
        ),
        ([USER, {"role": "assistant", "content": "<|im_end|> no end"}, USER], "assistant\n<|im_end|> no end<|im_end|>"),
    ],
)
async def test_histories_as_other_agents_write_them(messages: list[dict[str, Any]], shown: str) -> None:
    answer = await scripted("x").complete({"messages": messages, "tools": [TOOL]})
    assert shown in prompt_text(answer)
    ends = answer["prompt_token_ids"].count(tiny_tokenizer().convert_tokens_to_ids("<|im_end|>"))
    assert ends == shown_ends(messages)


def shown_ends(messages: list[dict[str, Any]]) -> int:
    """An end for each message, two of the assistant's in a row being one."""
    roles = [message["role"] for message in messages]
    return len(roles) - sum(a == b == "assistant" for a, b in itertools.pairwise(roles))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages has to be"),
        ({"messages": [USER], "stream": True}, "stream"),
        ({"messages": [USER], "n": 2}, "n=2 is not served"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format=.*not enforced"),
        ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {}}}, "not enforced"),
        ({"messages": [USER], "guided_json": {}}, "guided_json"),
        ({"messages": [USER], "tools": [TOOL], "tool_choice": "required"}, "tool_choice='required'.*forced"),
        (
            {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "bash"}}},
            "tool_choice=.*forced",
        ),
        ({"messages": [USER], "top_p": 0.9}, "top_p=0.9 is not served.*whole distribution"),
        ({"messages": [USER], "logit_bias": {"7": -100}}, "logit_bias"),
        ({"messages": [USER], "functions": [TOOL["function"]]}, "functions.*name them in tools"),
        ({"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}, "settings render the prompt"),
        ({"messages": [USER], "stop": ["a", ""]}, "stop=.*none of them empty"),
        ({"messages": [USER], "stop": 7}, "stop=7"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens=0 leaves no room"),
        ({"messages": [USER], "temperature": "warm"}, "temperature='warm' is no number"),
        ({"messages": [USER], "tools": {"bash": TOOL}}, "tools has to be a list"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "the last message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ({"messages": [USER], "tools": [{"type": "retrieval"}]}, "none of type function"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, "maximum context length is 500"),
    ],
)
async def test_what_cannot_be_served_is_named(body: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        await scripted("x").complete(body)


async def test_a_text_of_stop_ends_the_reply_before_it() -> None:
    whole = (await scripted("one two three").complete({"messages": [USER]}))["choices"][0]
    cases: list[tuple[str | list[str], str]] = [("two", "one "), (["x", "three", " two"], "one"), ("e t", "on")]
    for stop, text in [*cases, ("zebra", "one two three")]:
        endpoint = scripted("one two three", "on")
        (choice,) = (await endpoint.complete({"messages": [USER], "stop": stop}))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        held = str(tiny_tokenizer().decode(choice["token_ids"]))
        # The ids are those that were sampled, up to the token that completes the stop and no further.
        assert choice["token_ids"] == whole["token_ids"][: len(choice["token_ids"])]
        stops = [stop] if isinstance(stop, str) else stop
        before = str(tiny_tokenizer().decode(choice["token_ids"][:-1]))
        assert text == "one two three" or (any(s in held for s in stops) and not any(s in before for s in stops))
        history = [USER, choice["message"], {"role": "user", "content": "on"}]
        after = await endpoint.complete({"messages": history})
        assert held in prompt_text(after)


async def test_calls_and_stop() -> None:
    body = {"messages": [USER], "tools": [TOOL]}
    (cut,) = (await scripted("<bash>ls</bash>").complete({**body, "stop": "</bash>"}))["choices"]
    assert (cut["message"], cut["finish_reason"]) == ({"role": "assistant", "content": "<bash>ls"}, "stop")
    (called,) = (await scripted("<bash>ls</bash> and then").complete({**body, "stop": [" and"]}))["choices"]
    assert called["finish_reason"] == "tool_calls"
    assert json.loads(called["message"]["tool_calls"][0]["function"]["arguments"]) == {"command": "ls"}


async def test_no_call_where_the_agent_wants_none() -> None:
    body = {"messages": [USER], "tools": [TOOL]}
    (choice,) = (await scripted(CALL).complete({**body, "tool_choice": "none"}))["choices"]
    assert choice["message"] == {"role": "assistant", "content": CALL}
    (choice,) = (await scripted(CALL).complete({**body, "tool_choice": "auto"}))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    # Two calls may come where the renderer reads two, and an agent that wants one at a time is told.
    with pytest.raises(ValueError, match="parallel_tool_calls=false is not served, since a reply may hold 2"):
        await scripted(CALL, calls=2).complete({**body, "parallel_tool_calls": False})
    assert await scripted(CALL).complete({**body, "parallel_tool_calls": False})


async def test_values_that_change_nothing_are_taken() -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "stream": False,
        "top_p": 1.0,
        "top_k": -1,
        "frequency_penalty": 0,
        "logit_bias": {},
    }
    neutral |= {"response_format": {"type": "text"}, "stop": [], "tool_choice": "auto", "logprobs": True}
    nulls: dict[str, Any] = dict.fromkeys(
        ("n", "stream", "stop", "tools", "tool_choice", "response_format", "seed", "max_tokens")
    )
    for fields in (neutral, nulls):
        answer = await scripted("one").complete({"messages": [USER], **fields})
        assert answer["choices"][0]["message"]["content"] == "one"


def test_a_taken_port_is_one_sentence_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot serve at 127.0.0.1 port {port} \(.*--port {port + 1}"):
            listen("127.0.0.1", port)
        result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path), "--port", str(port)])
        assert isinstance(result.exception, ConfigError) and "another program listens there" in str(result.exception)
        assert "Serving" not in result.output
    with pytest.raises(ConfigError, match=r"cannot serve at no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 8000)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "backtalk.cli", "serve", "--model", str(model), "--port", str(port)]
    command += ["--set", "rollout.max_tokens_per_turn=8", "--set", "temperature=1.0"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx2.get(f"{address}/health", timeout=5)
            break
        except httpx2.TransportError:
            assert server.poll() is None, "the server did not start"
            time.sleep(0.1)
    yield address
    server.terminate()
    assert server.wait(30) == 0


def test_over_http(url: str) -> None:
    assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "backtalk"
    asked = {"messages": [USER], "max_tokens": 5, "model": "backtalk"}
    one, two = (httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json() for _ in range(2))
    choice = one["choices"][0]
    assert 1 <= len(choice["token_ids"]) <= 5
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == one["usage"]["completion_tokens"]
    assert all(item["logprob"] < 0 for item in choice["logprobs"]["content"])
    assert two["prompt_token_ids"] == one["prompt_token_ids"]
    greedy = {**asked, "temperature": 0}
    same = [httpx2.post(f"{url}/v1/chat/completions", json=greedy, timeout=60).json() for _ in range(2)]
    assert same[0]["choices"][0]["token_ids"] == same[1]["choices"][0]["token_ids"]
    for wrong in (b"{", b"[]", b'{"messages": []}'):
        refused = httpx2.post(f"{url}/v1/chat/completions", content=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["message"]
