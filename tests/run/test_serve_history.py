"""What is served is, token for token, what training rendered: one policy plays a rollout and answers an agent."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backtalk.envs.base import Step
from backtalk.envs.terminal import BASH, SUBMIT
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.language.tool_formats.schemas import tool_schemas
from backtalk.messages import Message, Part, ToolCall
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.rollout import run_rollout
from backtalk.rollout.sampler import Completion, SamplingParams
from backtalk.run.serve import Endpoint
from backtalk.tasks.task import Task
from backtalk.trajectory import TokenRole
from families import TINY_NAMES, tokenizer_of

TOOLS = (BASH, SUBMIT)
LIMITS = RolloutLimits(max_turns=5, max_tokens=100_000, max_tokens_per_turn=4000)
PROMPT = (("system", "You work in a shell."), ("user", "How many files?"))


def call(command: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'bash', 'arguments': {'command': command}})}\n</tool_call>"


THOUGHT = "Let me look.\n</think>\n\n"
REPLIES = (  # as sampled where the template opens the thinking; elsewhere the tag is written too
    THOUGHT + call("ls -la"),
    THOUGHT + call("cat a") + "\n" + call("cat 'b c'"),
    THOUGHT + "I am not sure.",
    call("no thought before it"),
    THOUGHT + "So.\n" + call("wc -l <|im_end|> é"),
)
PLAIN = (call("ls -la"), call("cat a") + "\n" + call("cat 'b c'"), "I am not sure.", call("pwd"), call("id"))


class Shell:
    tools = TOOLS

    async def reset(self) -> tuple[Message, ...]:
        return tuple(Message(role, (Part(text, TokenRole.CONTEXT),)) for role, text in PROMPT)

    async def step(self, call: ToolCall) -> Step:
        text = f"ran {call.arguments['command']}\n"
        return Step((Message("tool", (Part("[note]\n", TokenRole.WARNING), Part(text, TokenRole.ENV_OUTPUT))),))

    async def score(self) -> None:
        return None


class Policy:
    """Says its replies in turn, whoever asks, and keeps the prompts that it was given."""

    policy_version = 0

    def __init__(self, renderer: Renderer, replies: Sequence[str], opened: bool) -> None:
        told = renderer.for_tools(TOOLS)
        texts = [text if opened or "</think>" not in text else f"<think>\n{text}" for text in replies]
        self.prompts = list[tuple[int, ...]]()
        self._ids = [told.encode_text(text) for text in texts]

    @asynccontextmanager
    async def session(self, key: str):
        yield self

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        ids = self._ids[len(self.prompts)]
        self.prompts.append(tuple(token_ids))
        return Completion(ids, (-0.5,) * len(ids), True)


@asynccontextmanager
async def opened(task: Task):
    yield Shell()


async def trained(policy: Policy, renderer: Renderer) -> list[Mapping[str, Any]]:
    trajectory = await run_rollout(
        Task(id="t", instruction=""), opened, policy, renderer, LIMITS, sample_index=0, key="k"
    )
    assert trajectory.num_turns == 5
    return list(trajectory.messages)


async def served(
    policy: Policy, renderer: Renderer, said: Sequence[Mapping[str, Any]], rewrite: Callable[[Any], Any], restart: bool
) -> None:
    """Ask for each of the replies, with what was said between them, as an agent does."""

    def new() -> Endpoint:
        return Endpoint(renderer, lambda params: policy, SamplingParams(max_tokens=4000), max_tokens=100_000)

    endpoint, history, tools = new(), list[Any](), tool_schemas(TOOLS)
    for message in said:
        if message["role"] == "assistant":
            asked = json.loads(json.dumps({"messages": rewrite(history), "tools": tools}))
            answer = await (new() if restart else endpoint).complete(asked)
            assert tuple(answer["prompt_token_ids"]) == policy.prompts[-1]
            history.append(answer["choices"][0]["message"])
        else:
            history.append({"role": message["role"], "content": message["content"]})


def as_given(history: list[Any]) -> list[Any]:
    return history


def written_anew(history: list[Any]) -> list[Any]:
    """Ids, JSON, null and missing fields, lists of parts: all as other agents write them."""
    anew = []
    for number, message in enumerate(history):
        message = {**message, "content": [{"type": "text", "text": message["content"] or ""}], "name": None}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "function": {"arguments": json.loads(c["function"]["arguments"]), "name": "bash", "x": None},
                    "id": f"{number}",
                }
                for c in calls
            ]
            message["content"] = None if number % 2 else ""
        anew.append(message)
    return anew


def renderer_of(name: str, thinking: Any = "off") -> Renderer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tokenizer has no template is shown elsewhere
        config = RendererConfig(tool_format=ToolFormat.HERMES, thinking=thinking, on_drift="fork", max_calls_per_turn=2)
        renderer = Renderer(tokenizer_of(name), (), config)
        renderer.for_tools(TOOLS)
        return renderer


@pytest.mark.parametrize("thinking", ["off", "keep", "strip"])
@pytest.mark.parametrize("name", TINY_NAMES)
async def test_served_prompts_are_those_of_training(name: str, thinking: str) -> None:
    renderer = renderer_of(name, thinking)
    opens = renderer.for_tools(TOOLS)._opens_thinking
    first = Policy(renderer, REPLIES, opens)
    said = await trained(first, renderer)
    for rewrite in (as_given, written_anew):
        second = Policy(renderer, REPLIES, opens)
        await served(second, renderer, said, rewrite, restart=False)
        assert second.prompts == first.prompts
    if thinking == "strip":
        decoded = renderer.encoder.decode(first.prompts[-1])
        assert "Let me look." not in decoded and "cat a" in decoded


@pytest.mark.parametrize("name", TINY_NAMES)
async def test_after_a_restart_the_same_prompts_are_rendered(name: str) -> None:
    """Where replies hold no more than text and calls, nothing of them is lost."""
    renderer = renderer_of(name)
    opens = renderer.for_tools(TOOLS)._opens_thinking  # then a reply has to end the thinking first
    replies = [("\n\n</think>\n\n" if opens else "") + text for text in PLAIN]
    first = Policy(renderer, replies, True)
    said = await trained(first, renderer)
    for rewrite in (as_given, written_anew):
        second = Policy(renderer, replies, True)
        await served(second, renderer, said, rewrite, restart=True)
        assert second.prompts == first.prompts
