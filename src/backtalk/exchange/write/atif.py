"""Our trajectories as Harbor's ATIF (Agent Trajectory Interchange Format): plain dicts, nothing of Harbor needed.

Written against ``harbor.models.trajectories`` of harbor 0.24.0 and held to it by the tests. Reading ATIF is
`backtalk.exchange.read.trajectory_from_atif`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backtalk import __version__
from backtalk.errors import DataError
from backtalk.messages import ToolCall, ToolSpec
from backtalk.trajectory import TokenRole, Trajectory

SCHEMA_VERSION = "ATIF-v1.7"  # the first with `trajectory_id` and `llm_call_count`; nothing of 1.8 (audio) is used
AGENT_NAME = "backtalk"

CallsOf = Callable[[Sequence[int]], Sequence[ToolCall]]


def to_atif(
    trajectory: Trajectory,
    *,
    model_name: str | None = None,
    tools: Sequence[ToolSpec] = (),
    calls_of: CallsOf | None = None,
) -> dict[str, Any]:
    """One trajectory as an ATIF document.

    An agent step is one action: ``metrics`` hold the whole prompt before it, its tokens and, where all of them were
    sampled, the sampler's logprobs in nats, unchanged. What the world answered is the step's ``observation``. The
    root's ``extra["backtalk"]`` has what ATIF has no place for: reward, stop reason, and the role of every token as
    runs ``[role, tokens, turn, tool, branch]``, with the ids of what follows the last action.

    ``calls_of`` reads an action's tool calls from its token ids, for example
    ``lambda ids: renderer.parse_action(ids, True).calls``. Without it a step has its message alone.

    Raises:
        DataError: nothing was said; or messages and actions do not belong together one by one.
    """
    dialogue = _turns(trajectory)
    steps = [_given_step(message) for message in dialogue[0]]
    actions = _actions(trajectory)
    if actions and len(actions) != len(dialogue) - 1:
        raise DataError(
            f"trajectory {trajectory.task_id!r} has {len(actions)} actions and {len(dialogue) - 1} messages of "
            "the assistant, so which action said what cannot be told; export trajectories that keep all their messages"
        )
    for number, (said, *answers) in enumerate(dialogue[1:]):
        action = actions[number] if actions else None
        steps.append(_agent_step(number, said, answers, action, calls_of))
    if not steps:
        raise DataError(f"trajectory {trajectory.task_id!r} holds no message, and ATIF needs at least one step")
    for number, step in enumerate(steps, 1):
        step["step_id"] = number
    agent: dict[str, Any] = {"name": AGENT_NAME, "version": __version__}
    agent |= {"model_name": model_name} if model_name else {}
    agent |= {"tool_definitions": [_definition(tool) for tool in tools]} if tools else {}
    name = f"{trajectory.task_id}/{trajectory.sample_index}/{trajectory.policy_version}"
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


def _turns(trajectory: Trajectory) -> list[list[Mapping[str, Any]]]:
    """The messages, cut before each of the assistant's; the first stretch is what was given."""
    stretches: list[list[Mapping[str, Any]]] = [[]]
    for message in trajectory.messages:
        if message["role"] == "assistant":
            stretches.append([])
        stretches[-1].append(message)
    return stretches


@dataclass(frozen=True, slots=True)
class _Action:
    """A turn's action with the tokens of its branch before it."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # None unless all of it was sampled


def _actions(trajectory: Trajectory) -> list[_Action]:
    first: dict[int | None, int] = {}  # where each turn's action begins
    branch_starts: dict[int, int] = {}
    for start, _, segment in trajectory.spans():
        branch_starts.setdefault(segment.branch, start)
        if segment.role is TokenRole.ACTION:
            first.setdefault(segment.turn, start)
    found = []
    for action in trajectory.actions:
        prompt = trajectory.token_ids[branch_starts[action[0].branch] : first[action[0].turn]]
        ids = tuple(token for segment in action for token in segment.token_ids)
        sampled = all(segment.is_sampled for segment in action)
        logprobs = tuple(x for segment in action for x in segment.logprobs or ())
        found.append(_Action(prompt, ids, logprobs if sampled else None))
    return found


def _given_step(message: Mapping[str, Any]) -> dict[str, Any]:
    source = "system" if message["role"] == "system" else "user"
    return {"source": source, "message": str(message["content"])}


def _agent_step(
    number: int,
    said: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    action: _Action | None,
    calls_of: CallsOf | None,
) -> dict[str, Any]:
    step: dict[str, Any] = {"source": "agent", "message": str(said["content"])}
    ids: list[str] = []
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
        ids = [f"call_{number}_{i}" for i in range(len(calls))]
        if calls:
            step["tool_calls"] = [
                {"tool_call_id": one, "function_name": call.tool, "arguments": dict(call.arguments)}
                for one, call in zip(ids, calls, strict=True)
            ]
    if answers:
        step["observation"] = {"results": [_result(i, answer, ids) for i, answer in enumerate(answers)]}
    return step


def _result(index: int, answer: Mapping[str, Any], call_ids: Sequence[str]) -> dict[str, Any]:
    """An answer, with the call it belongs to: calls are answered in order, and what ends an episode is not."""
    result: dict[str, Any] = {"content": str(answer["content"])}
    if index < len(call_ids):
        result["source_call_id"] = call_ids[index]
    if answer.get("tool") is not None:
        result["extra"] = {"tool": answer["tool"]}
    return result


def _definition(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _extra(trajectory: Trajectory) -> dict[str, Any]:
    segments = trajectory.segments
    last = max((i for i, segment in enumerate(segments) if segment.role is TokenRole.ACTION), default=-1)
    after = segments[last + 1 :] if last >= 0 else ()
    extra: dict[str, Any] = {
        "task_id": trajectory.task_id,
        "sample_index": trajectory.sample_index,
        "policy_version": trajectory.policy_version,
        "reward": trajectory.reward,
        "stop_reason": trajectory.stop_reason.value,
        "stats": dict(trajectory.stats),
        "segments": [[s.role.name, len(s), s.turn, s.tool, s.branch] for s in segments],
        "last_observation_token_ids": [token for segment in after for token in segment.token_ids],
    }
    if trajectory.failure is not None:
        failure = trajectory.failure
        extra["failure"] = {"phase": failure.phase, "error": failure.error, "message": failure.message}
    return extra
