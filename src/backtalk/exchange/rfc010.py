"""Trajectories as OpenEnv's RFC 010 describes them: token ids, a role a token, and three masks.

RFC 010 is a draft (2026-06-14). Its four roles are fewer than ours: TEMPLATE is written as ``context``. That it was the
chat template's, where one segment ends and the next begins, turns, tools and branches are no part of the RFC; they are
kept under ``metadata``, so that what is written comes back whole. Other readers may drop that; turns are then found
again from the masks, where every run of action tokens begins one. Ids, logprobs and masks are kept in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from backtalk.errors import DataError
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
_ROLES = {
    "context": TokenRole.CONTEXT,
    "action": TokenRole.ACTION,
    "env_output": TokenRole.ENV_OUTPUT,
    "warning": TokenRole.WARNING,
}


def to_rfc010(trajectory: Trajectory, world_loss_target: Rfc010Target = "env_only") -> dict[str, Any]:
    """A trajectory as JSON-ready data, every column with one entry a token.

    ``obs_mask`` is what the world term learns: environment output, and with ``world_loss_target`` "all" the harness's
    warnings too. ``action_mask`` is all that the agent wrote; ``logprobs`` are the sampler's in nats, None where a
    token was not sampled.

    Raises:
        DataError: an unknown ``world_loss_target``.
    """
    target = _check_target(world_loss_target)
    roles = trajectory.roles
    failure = trajectory.failure
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
        "metadata": {
            "task_id": trajectory.task_id,
            "sample_index": trajectory.sample_index,
            "policy_version": trajectory.policy_version,
            "stop_reason": trajectory.stop_reason.value,
            "failure": failure and {"phase": failure.phase, "error": failure.error, "message": failure.message},
            "stats": dict(trajectory.stats),
            "segments": [segment.to_dict() for segment in trajectory.segments],
        },
    }


def from_rfc010(record: Mapping[str, Any], *, task_id: str = "", sample_index: int = 0) -> Trajectory:
    """The trajectory of a record with ``action_mask``, ``obs_mask`` and ``warning_mask``; ``input_ids`` will do too.

    ``task_id`` and ``sample_index`` are for records without metadata. Actions without ``logprobs``, which the RFC
    does not ask for, are unsampled: without them there is no ratio, so the policy term cannot use them.

    Raises:
        DataError: columns of different lengths, masks that overlap, roles that contradict them, a logprob that is
            missing or not finite, or metadata of another trajectory.
    """
    token_ids = record.get("token_ids", record.get("input_ids"))
    if token_ids is None:
        raise DataError(f"a record of RFC 010 has 'token_ids' or 'input_ids', this one only {sorted(record)[:12]}")
    metadata = record.get("metadata") or {}
    failure = metadata.get("failure")
    try:
        strange = next((t for t, x in enumerate(token_ids) if type(x) is not int or not 0 <= x < 2**31), None)
        if strange is not None:
            raise DataError(f"token {strange} is {token_ids[strange]!r}, which is no token id")
        roles = _roles(record, len(token_ids))
        segments = tuple(_segments(tuple(token_ids), roles, record.get("logprobs"), metadata.get("segments")))
        reward = record.get("reward")
        return Trajectory(
            task_id=str(metadata.get("task_id") or task_id),
            sample_index=int(metadata.get("sample_index", sample_index)),
            policy_version=int(metadata.get("policy_version", 0)),
            segments=segments,
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


def _check_target(target: object) -> WorldLossTarget:
    """Return RFC 010's name of a target as ours."""
    if target not in ("env_only", "all"):
        raise DataError(
            f"world_loss_target={target!r} is unknown to RFC 010; use 'env_only', or 'all' for warnings as well"
        )
    return "warning_plus_env" if target == "all" else "env_only"


def _roles(record: Mapping[str, Any], n: int) -> list[TokenRole]:
    """The role of each token, from the masks, checked against ``roles`` where the record has them."""
    name = record.get("world_loss_target", "env_only")
    target = _check_target(name)
    masks = {name: _mask(record, name, n) for name in ("action_mask", "obs_mask", "warning_mask")}
    roles = []
    for t, (action, observed, warning) in enumerate(zip(*masks.values(), strict=True)):
        if action and (observed or warning):
            raise DataError(
                f"token {t} is in action_mask and in {'obs' if observed else 'warning'}_mask; one token, one role"
            )
        if warning and observed != is_target(TokenRole.WARNING, None, target):
            raise DataError(
                f"token {t} is {'in' if observed else 'not in'} obs_mask and in warning_mask with "
                f"world_loss_target={name!r}; obs_mask holds the warnings exactly where that is 'all'"
            )
        role = TokenRole.ACTION if action else TokenRole.WARNING if warning else TokenRole.ENV_OUTPUT
        roles.append(role if action or warning or observed else TokenRole.CONTEXT)
    names = record.get("roles")
    if names is not None:
        if len(names) != n:
            raise DataError(f"roles has {len(names)} entries for {n} tokens; one a token is needed")
        for t, (name, role) in enumerate(zip(names, roles, strict=True)):
            if _ROLES.get(name) is not role:
                raise DataError(
                    f"token {t} has role {name!r} and is {ROLE_NAMES[role]!r} by the masks; they must agree"
                )
    return roles


def _mask(record: Mapping[str, Any], name: str, n: int) -> list[bool]:
    mask = record.get(name)
    if mask is None:
        raise DataError(f"the record has no {name!r}; RFC 010 wants action_mask, obs_mask and warning_mask")
    values = list(mask)
    if len(values) != n:
        raise DataError(f"{name} has {len(values)} entries for {n} tokens; a mask of shape [{n}] is needed")
    strange = next((t for t, x in enumerate(values) if x not in (0, 1)), None)
    if strange is not None:
        raise DataError(f"{name}[{strange}] is {values[strange]!r}; a mask holds booleans, or 0 and 1")
    return [bool(x) for x in values]


def _segments(
    ids: tuple[int, ...], roles: Sequence[TokenRole], logprobs: Sequence[float | None] | None, kept: Any
) -> Iterator[Segment]:
    if logprobs is not None and len(logprobs) != len(ids):
        raise DataError(f"logprobs has {len(logprobs)} entries for {len(ids)} tokens; one a token is needed")
    start = 0
    for part in _runs(roles, logprobs) if kept is None else kept:
        end = start + int(part["length"])
        role = (
            TokenRole[part["role"]]
            if "role" in part
            else roles[start]
            if start < end <= len(ids)
            else TokenRole.CONTEXT
        )
        if end > len(ids) or {ROLE_NAMES[one] for one in roles[start:end]} - {ROLE_NAMES[role]}:
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


def _runs(roles: Sequence[TokenRole], logprobs: Sequence[float | None] | None) -> Iterator[dict[str, Any]]:
    """Segments where nothing says what they were: each run of one role, sampled or not; a turn from each action on."""
    turn: int | None = None
    before: TokenRole | None = None
    known = [x is not None for x in logprobs or [None] * len(roles)]
    for (role, sampled), run in groupby(zip(roles, known, strict=True)):
        if role is TokenRole.ACTION and before is not role:
            turn = 0 if turn is None else turn + 1
        before = role
        yield {"length": len(list(run)), "turn": turn, "sampled": sampled}


def _finite(logprob: float | None, t: int) -> float:
    if logprob is None or not math.isfinite(logprob):
        raise DataError(f"logprobs[{t}] is {logprob}, but its segment says that it was sampled")
    return float(logprob)
