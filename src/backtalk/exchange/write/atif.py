"""Write trajectories as Harbor's ATIF (Agent Trajectory Interchange Format): plain dicts, nothing of Harbor needed.

Written against ``harbor.models.trajectories`` of harbor 0.24.0 and held to it by the tests. Reading ATIF is
`backtalk.exchange.read.atif.trajectory_from_atif`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backtalk import __version__
from backtalk.errors import DataError
from backtalk.exchange.rfc010 import facts
from backtalk.exchange.write.turns import (
    CallsOf,
    branch_starts,
    check_one_message_an_action,
    messages_by_turn,
    rollout_name,
)
from backtalk.language.tool_formats.schemas import tool_schemas
from backtalk.messages import ToolSpec
from backtalk.trajectory import TokenRole, Trajectory

SCHEMA_VERSION = "ATIF-v1.7"  # the first with `trajectory_id` and `llm_call_count`; nothing of 1.8 (audio) is used
AGENT_NAME = "backtalk"


def to_atif(
    trajectory: Trajectory,
    *,
    model_name: str | None = None,
    tools: Sequence[ToolSpec] = (),
    calls_of: CallsOf | None = None,
) -> dict[str, Any]:
    """Return one trajectory as an ATIF document.

    An agent step is one action: ``metrics`` hold the whole prompt before it, its tokens and, where all of them were
    sampled, the sampler's logprobs in nats, unchanged. What the environment answered is the step's ``observation``. The
    root's ``extra["backtalk"]`` has what ATIF has no place for: reward, stop reason, and the role of every token as
    runs ``[role, tokens, turn, tool, branch]``, with the ids of what follows the last action.

    ``calls_of`` reads an action's tool calls from its token ids, for example
    ``lambda ids: renderer.parse_action(ids, True).calls``. Without it a step has its message alone.

    Raises:
        DataError: there is no message; or messages and actions do not belong together one by one.
    """
    given, *turns = messages_by_turn(trajectory)
    steps: list[dict[str, Any]] = [
        {"source": "system" if message["role"] == "system" else "user", "message": str(message["content"])}
        for message in given
    ]
    actions = _actions(trajectory)
    if actions:
        check_one_message_an_action(trajectory, turns)
    for number, (reply, *answers) in enumerate(turns):
        steps.append(_agent_step(number, reply, answers, actions[number] if actions else None, calls_of))
    if not steps:
        raise DataError(f"trajectory {trajectory.task_id!r} holds no message, and ATIF needs at least one step")
    for number, step in enumerate(steps, 1):
        step["step_id"] = number
    agent: dict[str, Any] = {"name": AGENT_NAME, "version": __version__}
    agent |= {"model_name": model_name} if model_name else {}
    agent |= {"tool_definitions": tool_schemas(tools)} if tools else {}
    name = rollout_name(trajectory)
    return {
        "schema_version": SCHEMA_VERSION,
        "session_id": name,
        "trajectory_id": name,
        "agent": agent,
        "steps": steps,
        "final_metrics": {
            "total_prompt_tokens": sum(len(action.prompt) for action in actions),
            "total_completion_tokens": sum(len(action.token_ids) for action in actions),
            "total_steps": len(steps),
        },
        "extra": {"backtalk": _extra(trajectory)},
    }


@dataclass(frozen=True, slots=True)
class _Action:
    """A turn's action with the tokens of its branch before it."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # None unless all of it was sampled


def _actions(trajectory: Trajectory) -> list[_Action]:
    written = [span for span in reversed([*trajectory.spans()]) if span[2].role is TokenRole.ACTION]
    first = {segment.turn: start for start, _, segment in written}  # position of each turn's action
    starts, found = branch_starts(trajectory), []
    for action in trajectory.actions:
        prompt = trajectory.token_ids[starts[action[0].branch] : first[action[0].turn]]
        ids = tuple(token for segment in action for token in segment.token_ids)
        sampled = all(segment.is_sampled for segment in action)
        logprobs = tuple(x for segment in action for x in segment.logprobs or ())
        found.append(_Action(prompt, ids, logprobs if sampled else None))
    return found


def _agent_step(
    number: int,
    reply: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    action: _Action | None,
    calls_of: CallsOf | None,
) -> dict[str, Any]:
    step: dict[str, Any] = {"source": "agent", "message": str(reply["content"])}
    call_ids: list[str] = []
    if action is not None:
        step["metrics"] = {
            "prompt_tokens": len(action.prompt),
            "completion_tokens": len(action.token_ids),
            "prompt_token_ids": list(action.prompt),
            "completion_token_ids": list(action.token_ids),
        }
        if action.logprobs is not None:
            step["llm_call_count"] = 1
            step["metrics"]["logprobs"] = list(action.logprobs)
        calls = list(calls_of(action.token_ids)) if calls_of is not None else []
        call_ids = [f"call_{number}_{i}" for i in range(len(calls))]
        if calls:
            step["tool_calls"] = [
                {"tool_call_id": call_id, "function_name": call.tool, "arguments": dict(call.arguments)}
                for call_id, call in zip(call_ids, calls, strict=True)
            ]
    if answers:
        step["observation"] = {"results": [_result(i, answer, call_ids) for i, answer in enumerate(answers)]}
    return step


def _result(index: int, answer: Mapping[str, Any], call_ids: Sequence[str]) -> dict[str, Any]:
    """Return an answer with the id of its call: calls are answered in order, one that ends the rollout maybe not."""
    result: dict[str, Any] = {"content": str(answer["content"])}
    if index < len(call_ids):
        result["source_call_id"] = call_ids[index]
    if answer.get("tool") is not None:
        result["extra"] = {"tool": answer["tool"]}
    return result


def _extra(trajectory: Trajectory) -> dict[str, Any]:
    segments = trajectory.segments
    last = max((i for i, segment in enumerate(segments) if segment.role is TokenRole.ACTION), default=-1)
    after = segments[last + 1 :] if last >= 0 else ()
    return {
        **{name: value for name, value in facts(trajectory).items() if value is not None},
        "reward": trajectory.reward,
        "segments": [[s.role.name, len(s), s.turn, s.tool, s.branch] for s in segments],
        "last_observation_token_ids": [token for segment in after for token in segment.token_ids],
    }
