"""Write OpenEnv's records: EpisodeRecord (messages) and TrainingTrace (token ids), with the roles that neither has.

Written against openenv 0.10.0 and held to its own classes by the tests. What RFC 010 adds is put where each record
allows unknown fields: ``extra`` of an EpisodeRecord, ``metadata`` of a TrainingTurn. ``backtalk.exchange.read``
reads both back without loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.rfc010 import Rfc010Target, to_rfc010
from backtalk.exchange.write.turns import (
    CallsOf,
    branch_starts,
    check_one_message_an_action,
    messages_by_turn,
    rollout_name,
)
from backtalk.trajectory import StopReason, Trajectory

_COLUMNS = ("token_ids", "action_mask", "obs_mask", "warning_mask")


def to_episode_record(
    trajectory: Trajectory, *, calls_of: CallsOf | None = None, world_loss_target: Rfc010Target = "env_only"
) -> dict[str, Any]:
    """Return a trajectory as the fields of an ``EpisodeRecord``; ``extra["rfc010"]`` is the whole record of RFC 010.

    An assistant's message is the text that was sampled, calls as they were written. ``calls_of`` reads the calls from
    an action's ids, for example ``lambda ids: renderer.parse_action(ids, True).calls``, and fills ``tool_trace``;
    without it that is empty.

    Raises:
        DataError: the trajectory has no reward, which an EpisodeRecord cannot say.
    """
    if trajectory.reward is None:
        why = f"it failed at {trajectory.failure.phase}" if trajectory.failure else "nobody scored it"
        raise DataError(
            f"{rollout_name(trajectory)} has no reward ({why}), and an EpisodeRecord must have one; 0 would be a lie. "
            "Export it as training-trace or rfc010, or leave it out"
        )
    done = trajectory.stop_reason in (StopReason.SUBMITTED, StopReason.ENV_DONE)
    return {
        "episode_id": rollout_name(trajectory),
        "messages": [_message(message) for message in trajectory.messages],
        "reward": trajectory.reward,
        "done": done,
        "tool_trace": [] if calls_of is None else list(_tool_trace(trajectory, calls_of, done)),
        "metrics": dict(trajectory.stats),
        "verify_metrics": {},
        "artifacts": {},
        "task": trajectory.task_id,
        "extra": {"rfc010": to_rfc010(trajectory, world_loss_target)},
    }


def to_training_trace(trajectory: Trajectory, *, world_loss_target: Rfc010Target = "env_only") -> dict[str, Any]:
    """Return a trajectory as a ``TrainingTrace``: a turn for each sampled action, ids and logprobs as they are.

    A turn's ``metadata["env_output_mask"]`` stands beside its ``loss_mask`` and has its length: what the world-model
    term learns of the prompt, each token in the first turn that has it. What follows the last action is in no prompt.

    A turn's ``metadata["observation"]`` holds the tokens after its completion, up to the next one, with ``obs_mask``,
    ``warning_mask``, and ``action_mask`` for what the agent wrote and nobody sampled. There each observation
    stands once, the last one too, which is in no prompt. The first turn's ``metadata["backtalk"]`` holds what belongs
    to the whole trajectory.

    Raises:
        DataError: no action was sampled, so there is nothing that a policy gradient may train.
    """
    record = to_rfc010(trajectory, world_loss_target)
    spans = [span for span in trajectory.spans() if span[2].is_sampled]
    if not spans:
        raise DataError(
            f"{rollout_name(trajectory)} has no action with logprobs (a script's, a person's or an imported one's have "
            "none), and a TrainingTrace holds nothing else; export it as rfc010 or episode-record"
        )
    starts = branch_starts(trajectory)
    following = [start for start, _, _ in spans[1:]] + [len(trajectory)]
    turns, seen = [], 0
    for index, ((start, end, action), upto) in enumerate(zip(spans, following, strict=True)):
        begin = starts[action.branch]
        prompt = record["token_ids"][begin:start]
        learned = [int(record["obs_mask"][t] and t >= seen) for t in range(begin, start)]
        seen = end
        turns.append(
            {
                "node_id": f"{rollout_name(trajectory)}/{index}",
                "prompt_token_ids": prompt,
                "completion_token_ids": list(action.token_ids),
                "per_token_logps": list(action.logprobs or ()),
                "loss_mask": [0] * len(prompt) + [1] * len(action),
                "metadata": {
                    "index": index,
                    "env_output_mask": learned + [0] * len(action),
                    "observation": {name: [int(x) for x in record[name][end:upto]] for name in _COLUMNS},
                },
            }
        )
    whole = {name: record[name] for name in ("metadata", "world_loss_target", "reward", "messages")}
    before = {name: [int(x) for x in record[name][: spans[0][0]]] for name in _COLUMNS}
    turns[0]["metadata"]["backtalk"] = {**whole, "before": before}
    return {"schema_version": 1, "turns": turns}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's format, where a tool's message names its tool."""
    named = {"name": message["tool"]} if message.get("tool") is not None else {}
    return {**{key: value for key, value in message.items() if key != "tool"}, **named}


def _tool_trace(trajectory: Trajectory, calls_of: CallsOf, done: bool) -> Iterator[dict[str, Any]]:
    """Yield calls with their answers: calls are answered in order, one that ended the rollout maybe not at all."""
    turns = messages_by_turn(trajectory)[1:]
    check_one_message_an_action(trajectory, turns)
    for turn, (action, (_, *answers)) in enumerate(zip(trajectory.actions, turns, strict=True)):
        calls = calls_of([token for segment in action for token in segment.token_ids])
        for number, call in enumerate(calls):
            last = done and turn == len(turns) - 1 and number == len(calls) - 1
            answer = str(answers[number]["content"]) if number < len(answers) else None
            result = {"data": answer, "done": last, "metadata": {}, "error": None}
            yield {"tool_name": call.tool, "arguments": dict(call.arguments), "result": result}
