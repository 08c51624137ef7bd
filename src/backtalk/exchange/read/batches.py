"""Read what SkyRL and rLLM dump: SkyRL's GeneratorOutput as rows of TRL's names, rLLM's episodes as turns or chat.

Read against SkyRL 0.3 (prompt_token_ids, response_ids, loss_masks, rollout_logprobs, rewards) and rLLM 0.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, mapping, required

_SKYRL = {
    "prompt_token_ids": "prompt_ids",
    "response_ids": "completion_ids",
    "loss_masks": "tool_mask",
    "rollout_logprobs": "logprobs",
    "rewards": "reward",
    "stop_reasons": "stop_reason",
}


def skyrl_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each response, with TRL's names. A reward a token is the sum of them.

    Raises:
        DataError: text without masks, as an evaluation dumps it, or columns of different lengths.
    """
    if "output_response" in record:
        raise DataError(
            "this dump of an evaluation holds a response as text, the model's and the environment's in one, so who "
            "wrote what cannot be told; dump the GeneratorOutput, which has loss_masks"
        )
    columns = {ours: record[theirs] for theirs, ours in _SKYRL.items() if record.get(theirs) is not None}
    ids = required(columns, "a GeneratorOutput", "prompt_ids")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns of a GeneratorOutput hold a row for each response, got {lengths}")
    names = record.get("trajectory_ids") or [None] * len(ids)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(ids))]
    for i, row in enumerate(rows):
        reward = row.get("reward")
        row |= {"reward": sum(reward) if isinstance(reward, (list, tuple)) else reward, **_named(names[i])}
    return rows


def _named(identifier: Any) -> dict[str, Any]:
    """Return the task of a TrajectoryID, which is the same for a group."""
    if isinstance(identifier, Mapping):
        identifier = first_of(identifier, "instance_id")
    return {} if identifier is None else {"task_id": str(identifier).rpartition("_")[0] or str(identifier)}


def rllm_trajectories(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trajectories of an episode, each with its task: turns of token ids, or else messages.

    Raises:
        DataError: a trajectory without steps, or with neither ids nor messages.
    """
    inner = record.get("trajectories")
    task = str(first_of(record, "id") or "").rpartition(":")[0] or None
    found = []
    for number, raw in enumerate([record] if inner is None else inner):
        what = f"trajectory {number}"
        one = mapping(raw, what)
        steps = [mapping(step, f"step {i} of {what}") for i, step in enumerate(required(one, what, "steps"))]
        if not steps:
            raise DataError(f"{what} has no steps")
        named = one.get("task")
        named = first_of(named, "id", "task_id", "uid", "instance_id") if isinstance(named, Mapping) else None
        about = {"task_id": task or named, "reward": one.get("reward")}
        if all(step.get("response_ids") for step in steps):
            turns: Sequence[Any] = [{k: s.get(k) for k in ("prompt_ids", "response_ids", "logprobs")} for s in steps]
            found.append({**about, "turns": turns})
        elif steps[-1].get("chat_completions"):
            found.append({**about, "messages": steps[-1]["chat_completions"]})
        else:
            raise DataError(f"{what} has neither response_ids nor chat_completions, so nothing of it is known")
    return found
