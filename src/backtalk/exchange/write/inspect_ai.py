"""Write trajectories as a log of inspect_ai, so that `inspect view` shows them: plain dicts, nothing of Inspect needed.

Written against ``inspect_ai.log.EvalLog`` of inspect_ai 0.3 and held to it by a test. Reading such logs is
`backtalk.exchange.read.inspect_ai`; token ids and roles are not in them, so those come back as text alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from backtalk import __version__
from backtalk.exchange.rfc010 import facts
from backtalk.exchange.write.turns import rollout_name
from backtalk.trajectory import StopReason, TokenRole, Trajectory

VERSION = 2  # of the log
SCORER = "reward"
_LIMITS = {StopReason.MAX_TURNS: "message", StopReason.MAX_TOKENS: "token", StopReason.DEADLINE: "time"}
_ROLES = ("system", "user", "assistant", "tool")


def to_inspect(trajectories: Sequence[Trajectory], *, task: str, model_name: str) -> dict[str, Any]:
    """Return one log with a sample for each trajectory; those of one task are its epochs.

    The reward is the sample's score, a broken environment its error, and metadata hold the counts of tokens by role.
    """
    epochs: Counter[str] = Counter()
    samples = []
    for trajectory in trajectories:
        epochs[trajectory.task_id] += 1
        samples.append(_sample(trajectory, epochs[trajectory.task_id], model_name))
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "version": VERSION,
        "status": "success",
        "eval": {
            "created": now,
            "task": task,
            "dataset": {"name": task, "samples": len(epochs), "sample_ids": list(epochs)},
            "model": model_name,
            "config": {"epochs": max(epochs.values(), default=1)},
            "packages": {"backtalk": __version__},
        },
        "plan": {"name": "backtalk", "steps": []},
        "results": {
            "total_samples": len(samples),
            "completed_samples": sum(trajectory.failure is None for trajectory in trajectories),
            "scores": [_mean(rewards)] if rewards else [],
        },
        "stats": {"started_at": now, "completed_at": now},
        "samples": samples,
    }


def _mean(rewards: Sequence[float]) -> dict[str, Any]:
    value = sum(rewards) / len(rewards)
    metrics = {"mean": {"name": "mean", "value": value}}
    return {"name": SCORER, "scorer": SCORER, "scored_samples": len(rewards), "metrics": metrics}


def _sample(trajectory: Trajectory, epoch: int, model_name: str) -> dict[str, Any]:
    messages = [_message(message, i, rollout_name(trajectory)) for i, message in enumerate(trajectory.messages)]
    said = next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), "")
    sample: dict[str, Any] = {
        "id": trajectory.task_id,
        "epoch": epoch,
        "uuid": rollout_name(trajectory),
        "input": [message for message in messages[: _prompt_length(messages)]],
        "target": "",
        "messages": messages,
        "output": {"model": model_name, "choices": [], "completion": said},
        "metadata": {"backtalk": {**facts(trajectory), "tokens": {r.name: trajectory.count(r) for r in TokenRole}}},
    }
    if trajectory.reward is not None:
        sample["scores"] = {SCORER: {"value": trajectory.reward, "answer": said}}
    if trajectory.stop_reason in _LIMITS:
        reached = len(trajectory) if trajectory.stop_reason is StopReason.MAX_TOKENS else trajectory.num_turns
        sample["limit"] = {"type": _LIMITS[trajectory.stop_reason], "limit": reached}
    if failure := trajectory.failure:
        message = f"{failure.error} in {failure.phase}: {failure.message}"
        sample["error"] = {"message": message, "traceback": failure.traceback, "traceback_ansi": failure.traceback}
    return sample


def _prompt_length(messages: Sequence[Mapping[str, Any]]) -> int:
    return next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))


def _message(message: Mapping[str, Any], number: int, rollout: str) -> dict[str, Any]:
    role = message["role"] if message["role"] in _ROLES else "user"
    found: dict[str, Any] = {"id": f"{rollout}/{number}", "role": role, "content": str(message.get("content") or "")}
    if role == "tool" and message.get("tool"):
        found["function"] = message["tool"]
    return found
