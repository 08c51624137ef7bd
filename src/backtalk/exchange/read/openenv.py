"""Read OpenEnv's EpisodeRecord (messages), TrainingTrace (token ids), and episodes of its Agent World Model.

Read against openenv 0.10.0. An EpisodeRecord has no token ids, so its actions are unsampled; a TrainingTrace has.
Where ``backtalk.exchange.write`` wrote the record, it also has the roles, and comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import mapping, required
from backtalk.exchange.read.chat import trajectory_from_chat
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.spellings import ChatMessage, chat_messages
from backtalk.exchange.read.turns import About, trajectory_from_turns, turns_of
from backtalk.exchange.rfc010 import from_rfc010
from backtalk.messages import Part, ToolCall
from backtalk.trajectory import TokenRole, Trajectory


def trajectory_from_openenv(record: Any, about: About, observations: Observations) -> Trajectory:
    """Return the trajectory of a TrainingTrace (``turns``), an EpisodeRecord (``messages``) or an episode (``steps``).

    Raises:
        DataError: none of the three, or what the importer of that one refuses.
    """
    record = mapping(record, "an OpenEnv record")
    if (own := _written_by_us(record)) is not None:
        return from_rfc010(own, task_id=about.task_id, sample_index=about.sample_index)
    if record.get("turns") is not None:
        return trajectory_from_turns(turns_of(record), about, observations)
    if record.get("messages") is not None:
        messages = chat_messages(record["messages"])
    elif record.get("steps") is not None:
        messages = awm_messages(record)
    else:
        raise DataError(f"an OpenEnv record has turns, messages or steps, this one only {sorted(record)[:12]}")
    return trajectory_from_chat(messages, about, observations)


def _written_by_us(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of RFC 010 inside one that we wrote; None where another program wrote it."""
    extra = record.get("extra")
    if isinstance(extra, Mapping) and isinstance(extra.get("rfc010"), Mapping):
        return dict(extra["rfc010"])
    turns = record.get("turns") or ()
    rows = [mapping(turn, f"turn {t}") for t, turn in enumerate(turns)] if isinstance(turns, (list, tuple)) else []
    whole = (rows[0].get("metadata") or {}).get("backtalk") if rows else None
    return None if whole is None else _whole(rows, mapping(whole, "metadata['backtalk']"))


def _whole(turns: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the whole trajectory: before the first action, then action and observation in turn."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("token_ids", "action_mask", "obs_mask", "warning_mask", "logprobs")
    }

    def add(rest: Mapping[str, Any], sampled: Sequence[int] = (), logprobs: Sequence[float] = ()) -> None:
        n, m = len(sampled), len(rest["token_ids"])
        columns["token_ids"] += [*sampled, *rest["token_ids"]]
        columns["action_mask"] += [1] * n + list(rest.get("action_mask") or [0] * m)
        columns["logprobs"] += [*logprobs, *([None] * m)]
        for name in ("obs_mask", "warning_mask"):
            columns[name] += [*([0] * n), *rest[name]]

    add(about["before"])
    for t, turn in enumerate(turns):
        prompt = list(turn["prompt_token_ids"])
        if prompt and columns["token_ids"][-len(prompt) :] != prompt:
            raise DataError(f"the prompt of turn {t} is not what the turns before it add up to; the trace was changed")
        add(turn["metadata"]["observation"], turn["completion_token_ids"], turn["per_token_logps"])
    return {**columns, **about}


def awm_messages(episode: Mapping[str, Any], prompt: str | None = None) -> list[ChatMessage]:
    """Return an episode of the Agent World Model as chat: the task, then each tool call and its result.

    A result is ENV_OUTPUT, the environment's ``warning`` before it WARNING. Without a ``prompt`` it is the task and the
    names of the tools.
    """
    if prompt is None:
        tools = ", ".join(map(str, episode.get("tools") or ()))
        prompt = str(required(episode, "an episode", "task")) + (f"\n\nTools: {tools}" if tools else "")
    messages = [ChatMessage(role="user", text=prompt)]
    for number, raw in enumerate(episode["steps"]):
        step = mapping(raw, f"step {number}")
        action = mapping(required(step, f"step {number}", "action"), f"the action of step {number}")
        tool = str(required(action, f"the action of step {number}", "tool_name"))
        messages.append(ChatMessage(role="assistant", text="", calls=(ToolCall(tool, action.get("arguments") or {}),)))
        parts = _observed(mapping(step.get("observation") or {}, f"the observation of step {number}"))
        messages.append(ChatMessage(role="tool", text="".join(p.text for p in parts), tool=tool, parts=parts))
    return messages


def _observed(observation: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return an environment's answer: a tool's result, the verifier's, or an error; a warning before it."""
    result = observation.get("tool_result")
    fields = ("verify_result", "reward_type") if observation.get("verify_result") is not None else ("error",)
    if result is None:
        result = {name: observation[name] for name in fields if observation.get(name) is not None} or ""
    text = result if isinstance(result, str) else json.dumps(result, sort_keys=True, ensure_ascii=False)
    warning = observation.get("warning")
    harness = (Part(f"{warning}\n", TokenRole.WARNING),) if warning else ()
    return (*harness, Part(text, TokenRole.ENV_OUTPUT))
