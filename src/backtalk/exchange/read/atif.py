"""Read Harbor's trajectories: ATIF 1.0 to 1.8 (``trajectory.json``), with token ids where the agent collected them.

Read against harbor 0.25.0. Where every model call has its ids they are the tokens, and an action keeps its logprobs;
elsewhere the messages are rendered, and no action is a sampled one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import mapping, numbers, required, token_ids
from backtalk.exchange.read.chat import trajectory_from_chat
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.spellings import ChatMessage
from backtalk.exchange.read.turns import About, Turn, trajectory_from_turns
from backtalk.language.openai_chat import content_text
from backtalk.messages import ToolCall
from backtalk.trajectory import Trajectory


def trajectory_from_atif(record: Any, about: About, observations: Observations) -> Trajectory:
    """Return the trajectory of one ATIF document.

    Steps that are ``is_copied_context`` are given text, observations too. Trajectories of subagents inside it are left
    out and counted.

    Raises:
        DataError: no steps, ids for some model calls only, or what the other importers refuse.
    """
    record = mapping(record, "an ATIF trajectory")
    steps = [mapping(step, f"step {i}") for i, step in enumerate(required(record, "an ATIF trajectory", "steps"), 1)]
    if record.get("subagent_trajectories"):
        about = replace(about, stats={**about.stats, "subagents": float(len(record["subagent_trajectories"]))})
    calls = [step for step in steps if step.get("source") == "agent" and step.get("llm_call_count") != 0]
    calls = [step for step in calls if not step.get("is_copied_context")]
    with_ids = [step for step in calls if (step.get("metrics") or {}).get("completion_token_ids") is not None]
    if with_ids and len(with_ids) < len(calls):
        raise DataError(f"{len(with_ids)} of {len(calls)} model calls have token ids; either all must, or none")
    if not with_ids:
        return trajectory_from_chat(atif_messages(steps), about, observations)
    return trajectory_from_turns([_turn(step, observations) for step in calls], about, observations)


def _turn(step: Mapping[str, Any], observations: Observations) -> Turn:
    what, metrics = f"step {step.get('step_id')}", step["metrics"]
    agent, *answers = _step_messages(step)
    logprobs = metrics.get("logprobs")
    return Turn(
        token_ids(required(metrics, what, "prompt_token_ids"), f"{what} prompt_token_ids"),
        token_ids(metrics["completion_token_ids"], f"{what} completion_token_ids"),
        None if logprobs is None else numbers(logprobs, f"{what} logprobs"),
        observation=tuple(observations.message("tool", m.text, m.tool, agent.commands) for m in answers),
        commands=agent.commands,
    )


def atif_messages(steps: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """Return the steps as chat: a step's observation becomes a tool message for each result."""
    return [message for step in steps for message in _step_messages(step)]


def _step_messages(step: Mapping[str, Any]) -> list[ChatMessage]:
    what, source, given = f"step {step.get('step_id')}", step.get("source"), bool(step.get("is_copied_context"))
    if source not in ("system", "user", "agent"):
        raise DataError(f"{what} has source {source!r}; ATIF knows system, user and agent")
    calls = [mapping(call, f"a call of {what}") for call in step.get("tool_calls") or ()]
    tools = {call.get("tool_call_id"): str(call.get("function_name")) for call in calls}
    only = next(iter(tools.values())) if len(set(tools.values())) == 1 else None
    text = content_text(step.get("message"), what)
    found: list[ChatMessage] = []
    if source == "agent":
        made = tuple(ToolCall(str(call.get("function_name")), call.get("arguments") or {}) for call in calls)
        reasoning = str(step.get("reasoning_content") or "")
        found = [ChatMessage(role="assistant", text=text, calls=made, reasoning=reasoning, given=given)]
    elif text:
        found = [ChatMessage(role=source, text=text, given=given)]
    observation = step.get("observation")
    results = mapping(observation, f"the observation of {what}").get("results") if observation is not None else None
    for raw in results or ():
        result = mapping(raw, f"a result of {what}")
        if result.get("content") is None and result.get("subagent_trajectory_ref"):
            raise DataError(f"{what} is answered by a subagent's trajectory, which has no text here")
        text = content_text(result.get("content"), f"a result of {what}")
        tool = tools.get(result.get("source_call_id"), only)
        found.append(ChatMessage(role="tool", text=text, tool=tool, given=given))
    return found
