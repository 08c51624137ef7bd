"""Write and read trajectories as OpenEnv's RFC 010 describes them: token ids, a role a token, and three masks.

RFC 010 is a draft (2026-06-14). Its four roles are fewer than ours: TEMPLATE is written as ``context``. That it was the
chat template's, where one segment ends and the next begins, turns, tools and branches are no part of the RFC; they are
kept under ``metadata``, so that what is written comes back whole. Other readers may drop that; turns are then found
again from the masks, where every run of action tokens begins one. Ids, logprobs and masks are kept in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from backtalk.errors import DataError
from backtalk.exchange.plain import booleans, required, runs
from backtalk.exchange.plain import token_ids as checked_ids
from backtalk.objective.roles import WorldLossTarget, is_target
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory

Rfc010Target = Literal["env_only", "all"]

ROLE_NAMES = {
    TokenRole.CONTEXT: "context",
    TokenRole.TEMPLATE: "context",
    TokenRole.ACTION: "action",
    TokenRole.ENV_OUTPUT: "env_output",
    TokenRole.WARNING: "warning",
}


def to_rfc010(trajectory: Trajectory, world_loss_target: Rfc010Target = "env_only") -> dict[str, Any]:
    """Return a trajectory as JSON-ready data, every column with one entry a token.

    ``obs_mask`` is what the world term learns: environment output, and with ``world_loss_target`` "all" the harness's
    warnings too. ``action_mask`` is all that the agent wrote; ``logprobs`` are the sampler's in nats, None where a
    token was not sampled.

    Raises:
        DataError: an unknown ``world_loss_target``.
    """
    target = _our_target(world_loss_target)
    roles = trajectory.roles
    return {
        "token_ids": list(trajectory.token_ids),
        "roles": [ROLE_NAMES[role] for role in roles],
        "action_mask": [role is TokenRole.ACTION for role in roles],
        "obs_mask": [is_target(s.role, s.turn, target) for s in trajectory.segments for _ in s.token_ids],
        "warning_mask": [role is TokenRole.WARNING for role in roles],
        "logprobs": list(trajectory.logprobs),
        "world_loss_target": world_loss_target,
        "reward": trajectory.reward,
        "messages": [dict(message) for message in trajectory.messages],
        "metadata": {**facts(trajectory), "segments": [segment.to_dict() for segment in trajectory.segments]},
    }


def facts(trajectory: Trajectory) -> dict[str, Any]:
    """Return the fields that other formats lack, apart from segments and the paths of a traceback."""
    failure = trajectory.failure
    return {
        "task_id": trajectory.task_id,
        "sample_index": trajectory.sample_index,
        "policy_version": trajectory.policy_version,
        "stop_reason": trajectory.stop_reason.value,
        "failure": failure and {"phase": failure.phase, "error": failure.error, "message": failure.message},
        "stats": dict(trajectory.stats),
    }


def from_rfc010(record: Mapping[str, Any], *, task_id: str = "", sample_index: int = 0) -> Trajectory:
    """Return the trajectory of a record with ``action_mask``, ``obs_mask`` and ``warning_mask``.

    Ids are under ``token_ids`` or ``input_ids``. ``task_id`` and ``sample_index`` are for records without metadata.
    Actions without ``logprobs``, which the RFC does not ask for, are unsampled: without them there is no ratio, so the
    policy term cannot use them.

    Raises:
        DataError: columns of different lengths, masks that overlap, roles that contradict them, a logprob that is
            missing or not finite, or metadata of another trajectory.
    """
    try:
        ids = checked_ids(required(record, "a record of RFC 010", "token_ids", "input_ids"), "token_ids")
        metadata = record.get("metadata") or {}
        failure = metadata.get("failure")
        reward = record.get("reward")
        return Trajectory(
            task_id=str(metadata.get("task_id") or task_id),
            sample_index=int(metadata.get("sample_index", sample_index)),
            policy_version=int(metadata.get("policy_version", 0)),
            segments=tuple(_segments(ids, _roles(record, len(ids)), record.get("logprobs"), metadata.get("segments"))),
            messages=tuple(dict(message) for message in record.get("messages") or ()),
            reward=None if reward is None else float(reward),
            stop_reason=StopReason(metadata.get("stop_reason", StopReason.SUBMITTED)),
            failure=None if failure is None else Failure(*(str(failure[k]) for k in ("phase", "error", "message"))),
            stats={str(name): float(x) for name, x in (metadata.get("stats") or {}).items()},
        )
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"this is no record of RFC 010 ({type(error).__name__}: {error})") from error


def _our_target(target: object) -> WorldLossTarget:
    """Return our name for RFC 010's name of a target; raise DataError for an unknown one."""
    if target not in ("env_only", "all"):
        raise DataError(
            f"world_loss_target={target!r} is unknown to RFC 010; use 'env_only', or 'all' for warnings as well"
        )
    return "warning_plus_env" if target == "all" else "env_only"


def _roles(record: Mapping[str, Any], n: int) -> list[TokenRole]:
    """Return the role of each token by the masks, checked against ``roles`` where the record has them."""
    name = record.get("world_loss_target", "env_only")
    warnings_are_targets = is_target(TokenRole.WARNING, None, _our_target(name))
    masks = [
        booleans(_column(required(record, "the record", mask), mask, n), mask)
        for mask in ("action_mask", "obs_mask", "warning_mask")
    ]
    roles = []
    for t, (action, observed, warning) in enumerate(zip(*masks, strict=True)):
        if action and (observed or warning):
            raise DataError(
                f"token {t} is in action_mask and in {'obs' if observed else 'warning'}_mask; one token, one role"
            )
        if warning and observed != warnings_are_targets:
            raise DataError(
                f"token {t} is {'in' if observed else 'not in'} obs_mask and in warning_mask with "
                f"world_loss_target={name!r}; obs_mask holds the warnings exactly where that is 'all'"
            )
        role = TokenRole.ACTION if action else TokenRole.WARNING if warning else TokenRole.ENV_OUTPUT
        roles.append(role if action or warning or observed else TokenRole.CONTEXT)
    names = record.get("roles")
    for t, given in enumerate(() if names is None else _column(names, "roles", n)):
        if given != ROLE_NAMES[roles[t]]:
            raise DataError(
                f"token {t} has role {given!r} and is {ROLE_NAMES[roles[t]]!r} by the masks; they must agree"
            )
    return roles


def _column(values: Any, name: str, n: int) -> Any:
    """Return a column of the record; raise DataError unless it has an entry for each of ``n`` tokens."""
    if len(values) != n:
        raise DataError(f"{name} has {len(values)} entries for {n} tokens; one a token is needed")
    return values


def _segments(
    ids: tuple[int, ...], roles: Sequence[TokenRole], logprobs: Sequence[float | None] | None, kept: Any
) -> Iterator[Segment]:
    """Yield the segments as ``metadata`` kept them, or by the runs of roles and of known logprobs."""
    known = [x is not None for x in _column([None] * len(ids) if logprobs is None else logprobs, "logprobs", len(ids))]
    start = 0
    for part in _guessed_segments(roles, known) if kept is None else kept:
        end = start + int(part["length"])
        first = roles[start] if start < min(end, len(ids)) else TokenRole.CONTEXT
        role = TokenRole[part["role"]] if "role" in part else first
        if end > len(ids) or {ROLE_NAMES[token] for token in roles[start:end]} - {ROLE_NAMES[role]}:
            raise DataError(f"metadata.segments does not fit the masks at tokens {start} to {end}; leave it out")
        sampled = None
        if role is TokenRole.ACTION and logprobs is not None and part.get("sampled", True):
            sampled = tuple(_finite(logprobs[t], t) for t in range(start, end))
        turn, tool = part.get("turn"), part.get("tool")
        turn, tool = None if turn is None else int(turn), None if tool is None else str(tool)
        yield Segment(role, ids[start:end], sampled, turn, tool, int(part.get("branch", 0)))
        start = end
    if start != len(ids):
        raise DataError(f"metadata.segments covers {start} of {len(ids)} tokens; leave it out")


def _guessed_segments(roles: Sequence[TokenRole], known: Sequence[bool]) -> Iterator[dict[str, Any]]:
    """Yield a segment for each run of one role, with or without logprobs; every action begins a turn."""
    turn: int | None = None
    before: TokenRole | None = None
    for (role, sampled), start, end in runs(zip(roles, known, strict=True)):
        if role is TokenRole.ACTION and before is not role:
            turn = 0 if turn is None else turn + 1
        before = role
        yield {"length": end - start, "turn": turn, "sampled": sampled}


def _finite(logprob: float | None, t: int) -> float:
    if logprob is None or not math.isfinite(logprob):
        raise DataError(f"logprobs[{t}] is {logprob}, but its segment says that it was sampled")
    return float(logprob)
