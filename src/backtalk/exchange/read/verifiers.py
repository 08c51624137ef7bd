"""Read what verifiers saves: traces, and rows of ``results.jsonl`` and its data sets.

A trace is a graph of messages with token ids, masks of the sampled ones and of those of the body; read against
verifiers 0.4.0 (``verifiers.v1.trace.Trace`` as it is written to disk). A row is prompt and completion as messages or
text, with calls as JSON text and answers of tools that name no tool; read against verifiers 0.1 to 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import (
    booleans,
    first_of,
    mapping,
    numbers,
    parsed,
    required,
    runs,
    same_length,
    token_ids,
)
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.spellings import chat_messages
from backtalk.exchange.read.turns import About, completion_segments
from backtalk.language.openai_chat import content_text
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory

_STOPS = {
    "max_turns": StopReason.MAX_TURNS,
    "max_input_tokens": StopReason.MAX_TOKENS,
    "max_output_tokens": StopReason.MAX_TOKENS,
    "max_total_tokens": StopReason.MAX_TOKENS,
    "max_turns_reached": StopReason.MAX_TURNS,  # in rows
    "prompt_too_long": StopReason.MAX_TOKENS,
}


def trajectory_from_trace(record: Any, about: About, observations: Observations) -> Trajectory:
    """Return the trajectory of one trace.

    Each leaf of its graph is a branch; a node that an earlier branch had is CONTEXT in the later ones.

    A trace with errors has no reward: verifiers leaves its rewards empty, which must not read as 0.

    Raises:
        DataError: a node without token ids, columns of different lengths, a graph that is none, or an observation
            without ``is_content`` whose template cannot be told.
    """
    record = mapping(record, "a verifiers trace")
    nodes = [mapping(node, f"node {i}") for i, node in enumerate(required(record, "a verifiers trace", "nodes"))]
    seen: set[int] = set()
    segments: list[Segment] = []
    turns: dict[int, int] = {}  # of sampled nodes
    for branch, path in enumerate(_paths(nodes)):
        turn = None
        for i in path:
            if nodes[i].get("sampled"):
                turn = turns.setdefault(i, len(turns))
            segments += [replace(s, branch=branch) for s in _node(nodes[i], i, turn, i in seen, observations)]
        seen.update(path)
    errors = [mapping(error, "an error") for error in record.get("errors") or ()]
    trajectory = replace(about, reward=_reward(record)).trajectory(
        segments, drifts=len({s.branch for s in segments}) - 1
    )
    if errors and not record.get("ok"):
        last = errors[-1]
        failure = Failure(str(record.get("stop_condition") or "step"), str(last.get("type")), str(last.get("message")))
        return replace(trajectory, reward=None, stop_reason=StopReason.FAILED, failure=failure)
    stop = StopReason.DEADLINE if record.get("is_timeout") else _STOPS.get(str(record.get("stop_condition")))
    return replace(trajectory, stop_reason=stop or about.stop_reason)


def _paths(nodes: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the nodes from the root to each leaf, leaves in order."""
    parents = [node.get("parent") for node in nodes]
    for i, parent in enumerate(parents):
        if parent is not None and not (isinstance(parent, int) and 0 <= parent < i):
            raise DataError(f"node {i} has parent {parent!r}; a parent is a node before it, or null")
    paths = []
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        path = [leaf]
        while (parent := parents[path[-1]]) is not None:
            path.append(parent)
        paths.append(path[::-1])
    return paths


def _node(
    node: Mapping[str, Any], number: int, turn: int | None, again: bool, observations: Observations
) -> list[Segment]:
    what = f"node {number}"
    ids = token_ids(required(node, what, "token_ids"), f"{what} token_ids")
    if not ids:
        raise DataError(f"{what} has no token ids: the trace was made without a training client, so it is only text")
    if again:
        return [Segment(TokenRole.CONTEXT, ids)]
    mask = booleans(node.get("mask") or [False] * len(ids), f"{what} mask")
    content = booleans(node.get("is_content") or [], f"{what} is_content") or None
    same_length(token_ids=ids, mask=mask, is_content=content)
    logprobs = numbers(node.get("logprobs") or [], f"{what} logprobs") or None
    if logprobs is not None and len(logprobs) != sum(mask):
        raise DataError(f"{what} has {sum(mask)} sampled tokens and {len(logprobs)} logprobs; one a token is needed")
    if not any(mask):
        return _given(node, ids, content, turn, observations)
    segments: list[Segment] = []
    for is_sampled, start, end in runs(mask):
        if is_sampled:
            known = None if logprobs is None else logprobs[sum(mask[:start]) : sum(mask[:end])]
            segments += completion_segments(ids[start:end], known, turn=turn or 0)
        else:  # the generation prompt
            segments.append(Segment(TokenRole.TEMPLATE, ids[start:end], turn=turn - 1 if turn else None))
    return segments


def _given(
    node: Mapping[str, Any],
    ids: tuple[int, ...],
    content: Sequence[bool] | None,
    turn: int | None,
    observations: Observations,
) -> list[Segment]:
    """Return a message that nobody sampled: prompt before the first turn, an observation after it."""
    message = mapping(node.get("message") or {}, "a message")
    role = {"tool": TokenRole.ENV_OUTPUT, "user": observations.user_role or TokenRole.CONTEXT}.get(
        str(message.get("role")), TokenRole.CONTEXT
    )
    if turn is None or role is TokenRole.CONTEXT:
        return [Segment(TokenRole.CONTEXT, ids, turn=turn)]
    tool = None if message.get("name") is None else str(message["name"])
    if content is None:
        if observations.role is None:
            raise DataError(
                f"a {message.get('role')} message ({content_text(message.get('content'), 'a message')[:40]!r}) has no "
                "is_content, so its template cannot be told from its body; say --observation-role env_output "
                "to take all of it"
            )
        return [Segment(observations.role, ids, turn=turn, tool=tool)]
    return [
        Segment(role if is_body else TokenRole.TEMPLATE, ids[start:end], turn=turn, tool=tool)
        for is_body, start, end in runs(content)
    ]


def _reward(record: Mapping[str, Any]) -> float | None:
    """Return the weighted sum of the rewards that were given; None where there are none."""
    rewards = [mapping(r, "a reward") for r in (record.get("rewards") or {}).values() if r is not None]
    if not rewards:
        return None
    total = sum(float(r["score"]) * float(r.get("weight", 1.0)) for r in rewards)
    if not math.isfinite(total):
        raise DataError(f"the rewards sum to {total}; a reward is a finite number, or absent")
    return total


def read_result(record: Mapping[str, Any], name: str) -> Conversation:
    """Return the conversation of one row. A row with an error has no reward: verifiers writes 0 there.

    Raises:
        DataError: no prompt or completion, or a message that cannot be read.
    """
    prompt = _listed(required(record, "a result", "prompt"), "user", "prompt")
    completion = _listed(required(record, "a result", "completion"), "assistant", "completion")
    about = about_of(record, {}, name)
    if record.get("example_id") is not None:
        task = first_of(record, "env_id", "task")
        about = replace(about, task_id=f"{task}/{record['example_id']}" if task else str(record["example_id"]))
    error = record.get("error")
    if error:
        told = error if isinstance(error, Mapping) else {"error": str(error)}
        said = str(first_of(told, "error_chain_str", "error_chain_repr", "error"))
        about = replace(about, failure=Failure("step", str(told.get("error")), said))
    stop = _STOPS.get(str(record.get("stop_condition")))
    stop = StopReason.MAX_TOKENS if stop is None and record.get("is_truncated") else stop
    about = replace(about, stop_reason=stop or about.stop_reason, messages=kept_messages([*prompt, *completion]))
    return Conversation(messages=chat_messages([*prompt, *completion]), about=about)


def _listed(value: Any, role: str, what: str) -> list[Any]:
    """Return messages; a text, which an environment of completions has, as one message of ``role``."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return [{"role": role, "content": value}]
        value = parsed(value, what)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{what} is a {type(value).__name__}, not a text or a list of messages")
    return [
        mapping(parsed(message, f"message {i} of {what}"), f"message {i} of {what}") for i, message in enumerate(value)
    ]
