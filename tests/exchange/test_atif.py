"""Trajectories as ATIF and back. The oracles: a document written by hand, and our own importer.

That Harbor's own model takes what is written is in test_harbor_host.py, which needs Harbor.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backtalk import __version__
from backtalk.errors import DataError
from backtalk.exchange.read.atif import trajectory_from_atif
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.turns import About
from backtalk.exchange.write.atif import to_atif
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory
from tiny import tiny_tokenizer

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole

BY_HAND = Trajectory(
    task_id="t",
    sample_index=2,
    policy_version=7,
    segments=(
        Segment(CONTEXT, (1, 2, 3)),
        Segment(TEMPLATE, (4,)),
        Segment(ACTION, (10, 11), (-0.5, -0.25), turn=0),
        Segment(TEMPLATE, (5,), turn=0),
        Segment(ENV, (20, 21), turn=0, tool="bash"),
        Segment(TEMPLATE, (6,), turn=0),
        Segment(ACTION, (12,), (-1.5,), turn=1),
        Segment(ENV, (22,), turn=1, tool="bash"),
    ),
    messages=(
        {"role": "system", "content": "Work."},
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "wc -l f"},
        {"role": "tool", "content": "3 f\n", "tool": "bash"},
        {"role": "assistant", "content": "ls"},
        {"role": "tool", "content": "f\n", "tool": "bash"},
    ),
    reward=0.5,
    stop_reason=StopReason.MAX_TURNS,
    stats={"num_turns": 2.0},
)


def test_the_document_is_what_a_person_wrote() -> None:
    calls = {(10, 11): [ToolCall("bash", {"command": "wc -l f"})], (12,): []}
    tool = ToolSpec("bash", "Run it.", {"type": "object"})
    document = to_atif(BY_HAND, model_name="m", tools=[tool], calls_of=lambda ids: calls[tuple(ids)])
    assert document == {
        "schema_version": "ATIF-v1.7",
        "session_id": "t/2/7",
        "trajectory_id": "t/2/7",
        "agent": {
            "name": "backtalk",
            "version": __version__,
            "model_name": "m",
            "tool_definitions": [
                {
                    "type": "function",
                    "function": {"name": "bash", "description": "Run it.", "parameters": {"type": "object"}},
                }
            ],
        },
        "steps": [
            {"step_id": 1, "source": "system", "message": "Work."},
            {"step_id": 2, "source": "user", "message": "Count."},
            {
                "step_id": 3,
                "source": "agent",
                "message": "wc -l f",
                "llm_call_count": 1,
                "metrics": {
                    "prompt_tokens": 4,
                    "completion_tokens": 2,
                    "prompt_token_ids": [1, 2, 3, 4],
                    "completion_token_ids": [10, 11],
                    "logprobs": [-0.5, -0.25],
                },
                "tool_calls": [
                    {"tool_call_id": "call_0_0", "function_name": "bash", "arguments": {"command": "wc -l f"}}
                ],
                "observation": {
                    "results": [{"content": "3 f\n", "source_call_id": "call_0_0", "extra": {"tool": "bash"}}]
                },
            },
            {
                "step_id": 4,
                "source": "agent",
                "message": "ls",
                "llm_call_count": 1,
                "metrics": {
                    "prompt_tokens": 10,
                    "completion_tokens": 1,
                    "prompt_token_ids": [1, 2, 3, 4, 10, 11, 5, 20, 21, 6],
                    "completion_token_ids": [12],
                    "logprobs": [-1.5],
                },
                "observation": {"results": [{"content": "f\n", "extra": {"tool": "bash"}}]},
            },
        ],
        "final_metrics": {"total_prompt_tokens": 14, "total_completion_tokens": 3, "total_steps": 4},
        "extra": {
            "backtalk": {
                "task_id": "t",
                "sample_index": 2,
                "policy_version": 7,
                "reward": 0.5,
                "stop_reason": "max_turns",
                "stats": {"num_turns": 2.0},
                "segments": [
                    ["CONTEXT", 3, None, None, 0],
                    ["TEMPLATE", 1, None, None, 0],
                    ["ACTION", 2, 0, None, 0],
                    ["TEMPLATE", 1, 0, None, 0],
                    ["ENV_OUTPUT", 2, 0, "bash", 0],
                    ["TEMPLATE", 1, 0, None, 0],
                    ["ACTION", 1, 1, None, 0],
                    ["ENV_OUTPUT", 1, 1, "bash", 0],
                ],
                "last_observation_token_ids": [22],
            }
        },
    }
    assert json.loads(json.dumps(document)) == document


def test_a_failure_and_its_reason_are_kept() -> None:
    failure = Failure("score", "VerifierError", "no number")
    failed = replace(BY_HAND, reward=None, stop_reason=StopReason.FAILED, failure=failure)
    extra = to_atif(failed)["extra"]["backtalk"]
    assert extra["reward"] is None and extra["stop_reason"] == "failed"
    assert extra["failure"] == {"phase": "score", "error": "VerifierError", "message": "no number"}


def test_unsampled_actions_keep_their_tokens_and_have_no_logprobs() -> None:
    scripted = replace(BY_HAND, segments=tuple(replace(s, logprobs=None) for s in BY_HAND.segments))
    document = to_atif(scripted)
    agent = [step for step in document["steps"] if step["source"] == "agent"]
    assert [step["metrics"]["completion_token_ids"] for step in agent] == [[10, 11], [12]]
    assert not any("llm_call_count" in step or "logprobs" in step["metrics"] for step in agent)
    after = trajectory_from_atif(document, About(task_id="t"), Observations(role=ENV))
    assert [s for s in after.segments if s.role is ACTION] == [s for s in scripted.segments if s.role is ACTION]


def test_text_alone_is_steps_without_metrics() -> None:
    given_text = replace(BY_HAND, segments=(Segment(CONTEXT, (1, 2)),))
    steps = to_atif(given_text)["steps"]
    assert [step["source"] for step in steps] == ["system", "user", "agent", "agent"]
    assert not any("metrics" in step for step in steps)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (BY_HAND.messages[:4], "has 2 actions and 1 messages of the assistant"),
        ((), "has 2 actions and 0 messages of the assistant"),
    ],
)
def test_actions_without_their_messages_are_refused(messages: tuple[Any, ...], what: str) -> None:
    with pytest.raises(DataError, match=what):
        to_atif(replace(BY_HAND, messages=messages))
    with pytest.raises(DataError, match="holds no message"):
        to_atif(replace(BY_HAND, messages=(), segments=(Segment(CONTEXT, (1,)),)))


# ---------------------------------------------------------------- there and back


@cache
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), [], RendererConfig())


def encode(text: str) -> tuple[int, ...]:
    return tuple(renderer().tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def played(turns: list[tuple[str, str, str]], *, closed: list[bool]) -> Trajectory:
    """A rollout as `run_rollout` records one: (what the policy wrote, what the world and the harness said)."""
    prompt = [Message("system", (Part("Work.", CONTEXT),)), Message("user", (Part("Count.", CONTEXT),))]
    segments, messages = [*renderer().render_prompt(prompt)], [{"role": m.role, "content": m.text} for m in prompt]
    for turn, (wrote, said, warned) in enumerate(turns):
        ids = encode(wrote) + ((renderer().end_of_turn_id,) if closed[turn] else ())
        segments.append(Segment(ACTION, ids, tuple(-0.5 - i for i in range(len(ids))), turn=turn))
        parts = tuple(Part(text, role) for text, role in ((said, ENV), (warned, WARNING)) if text)
        answer = Message("tool", parts, tool="bash")
        segments += renderer().render_observation([answer], turn=turn, closed=closed[turn])
        messages += [{"role": "assistant", "content": wrote}, {"role": "tool", "content": answer.text, "tool": "bash"}]
    return Trajectory(task_id="t", sample_index=0, segments=tuple(segments), messages=tuple(messages), reward=1.0)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.data())
def test_a_round_trip_keeps_every_token_action_and_logprob(turns: list[tuple[str, str]], data: st.DataObject) -> None:
    closed = [data.draw(st.booleans()) for _ in turns]
    before = played([(wrote, said, "") for wrote, said in turns], closed=closed)
    document = json.loads(json.dumps(to_atif(before)))
    after = trajectory_from_atif(document, About(task_id="t", reward=1.0), Observations(renderer=renderer()))
    assert after.token_ids == before.token_ids
    assert after.logprobs == before.logprobs
    assert [s for s in after.segments if s.role is ACTION] == [s for s in before.segments if s.role is ACTION]
    first = next(start for start, _, s in before.spans() if s.role is ACTION)
    assert after.roles[first:] == before.roles[first:]  # a prompt comes back as given text, scaffold and all


def test_the_roles_that_an_importer_cannot_know_are_in_the_extra() -> None:
    before = played([("false", "no\n", "[exit code 1]"), ("true", "yes\n", "")], closed=[True, True])
    document = to_atif(before)
    after = trajectory_from_atif(document, About(task_id="t"), Observations(renderer=renderer()))
    assert after.token_ids == before.token_ids and after.count(WARNING) == 0 < before.count(WARNING)
    extra = document["extra"]["backtalk"]
    last = document["steps"][-1]["metrics"]
    ids = last["prompt_token_ids"] + last["completion_token_ids"] + extra["last_observation_token_ids"]
    rebuilt, at = [], 0
    for role, length, turn, tool, branch in extra["segments"]:
        rebuilt.append((TokenRole[role], tuple(ids[at : at + length]), turn, tool, branch))
        at += length
    assert rebuilt == [(s.role, s.token_ids, s.turn, s.tool, s.branch) for s in before.segments]


def test_branches_come_back_as_branches() -> None:
    branched = replace(
        BY_HAND,
        segments=(
            Segment(CONTEXT, (1, 2)),
            Segment(ACTION, (10, 11), (-0.5, -0.25), turn=0),
            Segment(ENV, (20,), turn=0, tool="bash"),
            Segment(CONTEXT, (1, 2, 9), branch=1),
            Segment(ACTION, (12,), (-1.5,), turn=1, branch=1),
        ),
        messages=BY_HAND.messages[:5],
    )
    document = to_atif(branched)
    assert [s["metrics"]["prompt_token_ids"] for s in document["steps"] if "metrics" in s] == [[1, 2], [1, 2, 9]]
    with pytest.raises(DataError, match="does not begin with"):
        trajectory_from_atif(document, About(task_id="t"), Observations(role=ENV))
    after = trajectory_from_atif(document, About(task_id="t"), Observations(role=ENV, on_drift="fork"))
    actions = [(s.token_ids, s.logprobs, s.branch) for s in after.segments if s.role is ACTION]
    assert actions == [((10, 11), (-0.5, -0.25), 0), ((12,), (-1.5,), 1)]
