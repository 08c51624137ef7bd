"""The endpoint: a real server on loopback over a tiny real model, and what it remembers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from backtalk.language.renderer import Renderer
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


def scripted(*replies: str, max_tokens: int = 500) -> Endpoint:
    renderer = Renderer(tiny_tokenizer(), ())
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


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages has to be"),
        ({"messages": [USER], "stream": True}, "stream"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "the last message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "other than text"),
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
            httpx.get(f"{address}/health", timeout=5)
            break
        except httpx.TransportError:
            assert server.poll() is None, "the server did not start"
            time.sleep(0.1)
    yield address
    server.terminate()
    assert server.wait(30) == 0


def test_over_http(url: str) -> None:
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "backtalk"
    asked = {"messages": [USER], "max_tokens": 5, "model": "backtalk"}
    one, two = (httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json() for _ in range(2))
    choice = one["choices"][0]
    assert 1 <= len(choice["token_ids"]) <= 5
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == one["usage"]["completion_tokens"]
    assert all(item["logprob"] < 0 for item in choice["logprobs"]["content"])
    assert two["prompt_token_ids"] == one["prompt_token_ids"]
    greedy = {**asked, "temperature": 0}
    same = [httpx.post(f"{url}/v1/chat/completions", json=greedy, timeout=60).json() for _ in range(2)]
    assert same[0]["choices"][0]["token_ids"] == same[1]["choices"][0]["token_ids"]
    for wrong in (b"{", b"[]", b'{"messages": []}'):
        refused = httpx.post(f"{url}/v1/chat/completions", content=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["message"]
