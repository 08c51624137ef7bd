"""Write trajectories as traces of Trackio, so that the Traces page of its dashboard shows them.

Written against ``trackio.Trace`` of trackio 0.43 and held to it by a test. Trackio has no file for traces: they are
logged, into a database of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import ConfigError
from backtalk.exchange.rfc010 import facts
from backtalk.exchange.write.turns import messages_by_turn, rollout_name
from backtalk.trajectory import TokenRole, Trajectory

_ROLES = ("system", "user", "assistant", "tool")


def to_trace(trajectory: Trajectory, *, model_name: str) -> dict[str, Any]:
    """Return the arguments of ``trackio.Trace``: messages, metadata, and spans of the rollout, its actions and tools.

    The usage of an action is the length of its history and its own, in tokens.
    """
    name, failure = rollout_name(trajectory), trajectory.failure
    root: dict[str, Any] = {"id": name, "name": trajectory.task_id, "kind": "span", "status": "success"}
    if failure:
        root |= {"status": "error", "error": f"{failure.error} in {failure.phase}: {failure.message}"}
    _, *turns = messages_by_turn(trajectory)
    usage = _usage(trajectory)
    spans = [root]
    for number, messages in enumerate(turns):
        found = usage[number] if len(usage) == len(turns) else {}
        spans += _turn(f"{name}/{number}", root["id"], messages, {"model": model_name, **found})
    return {
        "messages": [_message(message) for message in trajectory.messages],
        "metadata": {
            "status": root["status"],
            "reward": trajectory.reward,
            "tokens": {role.name: trajectory.count(role) for role in TokenRole},
            **facts(trajectory),
        },
        "spans": spans,
    }


def log_traces(path: Path, traces: Sequence[Mapping[str, Any]], *, run: str) -> None:
    """Log what ``to_trace`` returned to Trackio's database ``FOLDER/PROJECT.db``, by the steps of their policies.

    Raises:
        ConfigError: Trackio is not installed.
    """
    os.environ["TRACKIO_DIR"] = str(path.parent.resolve())  # which it reads when it is imported
    try:
        import trackio  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError("--format trackio needs Trackio; type: pip install 'backtalk[track]'") from error
    trackio.init(project=path.stem, name=run, embed=False, auto_log_gpu=False)
    for trace in traces:
        trackio.log({"rollout": trackio.Trace(**trace)}, step=trace["metadata"]["policy_version"])
    trackio.finish()


def _turn(
    name: str, rollout: str, messages: Sequence[Mapping[str, Any]], generation: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a span of an action, and one for each message that answers it."""
    reply, *answers = messages
    said = str(reply.get("content") or "")
    spans = [{"id": name, "parent_id": rollout, "name": "action", "kind": "generation", "output": said, **generation}]
    for number, answer in enumerate(answers):
        tool, output = answer.get("tool") or answer["role"], str(answer.get("content") or "")
        call = {"id": f"{name}/{number}", "parent_id": name, "name": tool, "kind": "tool", "status": "success"}
        spans.append({**call, "input": said, "output": output})
    return spans


def _usage(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return the tokens before each action and its own."""
    by_turn: dict[tuple[int, int | None], list[int]] = {}
    for start, end, segment in trajectory.spans():
        if segment.role is TokenRole.ACTION:
            by_turn.setdefault((segment.branch, segment.turn), [start, 0])[1] += end - start
    return [{"usage": {"input_tokens": start, "output_tokens": length}} for start, length in by_turn.values()]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = message["role"] if message["role"] in _ROLES else "user"
    named = {"name": message["tool"]} if role == "tool" and message.get("tool") else {}
    return {"role": role, "content": str(message.get("content") or ""), **named}
