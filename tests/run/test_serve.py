"""The endpoint: a real server on loopback over a tiny real model, and what it remembers."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.rollout.sampler import SamplingParams, ScriptedSampler
from backtalk.run.serve import Endpoint
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
