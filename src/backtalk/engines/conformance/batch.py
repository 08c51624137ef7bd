"""The fixed batch: every role and every hostile shape, in two groups of rollouts over tokens that occur only once.

As no token comes twice, a model that predicts from the last token alone has a parameter of its own for each of them,
and the gradient of each token can be read off the gradient of the table (``table``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from struct import pack, unpack

from backtalk.engines.conformance.table import FIRST_TOKEN, logprob
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

MAX_SEQ_LEN = 40  # L of fixed_length
CLIP = (0.2, 0.25)


@dataclass(frozen=True, slots=True)
class Run:
    """A run of tokens of one role. ``ratios`` are those of the policy to the sampler; None where nothing sampled."""

    role: TokenRole
    token_ids: tuple[int, ...]
    turn: int | None = None
    old_logprobs: tuple[float, ...] | None = None  # of the sampler, float32 numbers, in nats


@dataclass(frozen=True, slots=True)
class Row:
    """A rollout: its reward, None where it broke, and its branches."""

    name: str
    reward: float | None
    branches: tuple[tuple[Run, ...], ...]


# A letter is a role (c context, t template, a sampled action, s action of a script, e environment output, w warning),
# its number that of tokens. "|" begins a branch. "+" gives the first token of an action ratio 1.5 and the second 1.1,
# "-" gives them 0.5 and 0.9; others have ratio 1.
_GROUPS = (
    (
        ("two turns", 1.0, "c2 t2 a4+ t2 e5 t1 a3 t1 e2"),
        ("no observation", 0.0, "c3 a5-"),
        ("failed", None, "c2 t1 a2 t1 e4 w2"),
        ("two branches", 0.25, "c2 a2+ t1 e3 | c4 t1 a3- t1 w1 e2"),
    ),
    (
        ("truncated", 1.0, "c2 a3 t1 e6"),
        ("no sampled action", 1.0, "c2 s3 t1 e3"),
        ("prompt alone", 1.0, "c3"),
        ("a warning alone", 1.0, "c2 a2 t1 w3"),
    ),
)
_ROLES = {
    "c": TokenRole.CONTEXT,
    "t": TokenRole.TEMPLATE,
    "a": TokenRole.ACTION,
    "s": TokenRole.ACTION,
    "e": TokenRole.ENV_OUTPUT,
    "w": TokenRole.WARNING,
}
_RATIOS = {"+": (1.5, 1.1), "-": (0.5, 0.9), "": ()}


def groups() -> tuple[tuple[Row, ...], ...]:
    """Return the rows of both groups."""
    tokens = count(FIRST_TOKEN)
    return tuple(tuple(_row(name, reward, text, tokens) for name, reward, text in group) for group in _GROUPS)


def _row(name: str, reward: float | None, text: str, tokens: Iterator[int]) -> Row:
    branches: list[tuple[Run, ...]] = []
    turn: int | None = None
    for part in text.split("|"):
        runs: list[Run] = []
        before: int | None = None
        for word in part.split():
            letter, sign = word[0], word[-1] if word[-1] in "+-" else ""
            ids = tuple(next(tokens) for _ in range(int(word[1:].rstrip("+-"))))
            if letter in "as":
                turn = 0 if turn is None else turn + 1
            # What a later branch takes over from an earlier one has no turn.
            own_turn = turn if any(run.role is TokenRole.ACTION for run in runs) or letter in "as" else None
            old = None
            if letter == "a":
                ratios = (*_RATIOS[sign], *[1.0] * len(ids))[: len(ids)]
                history = (before if before is not None else ids[0], *ids)
                old = tuple(
                    _float32(logprob(history[i], token) - math.log(ratio))
                    for i, (token, ratio) in enumerate(zip(ids, ratios, strict=True))
                )
            runs.append(Run(_ROLES[letter], ids, own_turn, old))
            before = ids[-1]
        branches.append(tuple(runs))
    return Row(name, reward, tuple(branches))


def _float32(number: float) -> float:
    return unpack("f", pack("f", number))[0]


def trajectory_groups(rows: tuple[tuple[Row, ...], ...]) -> list[TrajectoryGroup]:
    """Return the rows as Backtalk's own record of rollouts."""
    return [
        TrajectoryGroup(f"group {g}", tuple(_trajectory(row, f"group {g}", i) for i, row in enumerate(group)))
        for g, group in enumerate(rows)
    ]


def _trajectory(row: Row, task_id: str, index: int) -> Trajectory:
    failure = Failure("step", "SandboxError", "the sandbox broke") if row.reward is None else None
    return Trajectory(
        task_id=task_id,
        sample_index=index,
        segments=tuple(
            Segment(run.role, run.token_ids, run.old_logprobs, run.turn, branch=number)
            for number, branch in enumerate(row.branches)
            for run in branch
        ),
        reward=row.reward,
        failure=failure,
        stop_reason=StopReason.FAILED if failure else StopReason.SUBMITTED,
    )
