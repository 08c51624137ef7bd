"""What happened in a rollout, token by token, with who made each token.

Everything here is frozen and checks itself. Nothing is inferred later: a token's role is recorded
where the token is appended (DESIGN: "who made a token is recorded where it is appended").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import accumulate, groupby, pairwise
from typing import Any


class TokenRole(IntEnum):
    """Who made a token."""

    CONTEXT = 0  # given text: system prompt, task instruction
    TEMPLATE = 1  # scaffold that the chat template adds around messages
    ACTION = 2  # written by the agent: a policy, a script, a person
    ENV_OUTPUT = 3  # what the world said
    WARNING = 4  # what the harness said: format warnings, parse errors, truncation notices


class StopReason(StrEnum):
    """Why a rollout ended. Every ending is a value; only FAILED means that the world broke."""

    SUBMITTED = "submitted"  # the policy finished with an answer
    ENV_DONE = "env_done"  # the environment ended the episode
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    DEADLINE = "deadline"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one role.

    ``logprobs`` are the sampler's own, in nats, one for each token of a sampled ACTION segment, and None on every
    other role. An ACTION with ``logprobs=None`` is unsampled, as of a script, a person or an imported text: the policy
    term leaves it alone. ``turn`` counts from 0 and is None before the first action. ``tool`` names the tool whose
    call produced an observation. ``branch`` counts the histories of a rollout, see Trajectory.
    """

    role: TokenRole
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    turn: int | None = None
    tool: str | None = None
    branch: int = 0

    def __post_init__(self) -> None:
        if self.role is TokenRole.ACTION:
            n = len(self.token_ids)
            if self.logprobs is not None and len(self.logprobs) != n:
                raise ValueError(
                    f"ACTION segment of {n} tokens needs {n} logprobs, got {len(self.logprobs)}; pass the sampler's "
                    "own logprobs unchanged, or logprobs=None where no policy sampled it"
                )
            if any(not math.isfinite(x) for x in self.logprobs or ()):
                raise ValueError("ACTION segment holds a logprob that is not finite; the sampler is broken")
            if self.turn is None:
                raise ValueError("ACTION segment needs the turn it belongs to, got turn=None")
        elif self.logprobs is not None:
            raise ValueError(f"{self.role.name} segment was not sampled, so it has no logprobs; pass logprobs=None")
        if any(token < 0 for token in self.token_ids):
            raise ValueError(f"{self.role.name} segment holds a negative token id, which is padding, not a token")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_sampled(self) -> bool:
        """Whether a policy sampled these tokens with known logprobs, so that the policy term may train them."""
        return self.logprobs is not None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data without tokens and logprobs, which files keep as columns of the whole trajectory."""
        return {
            "role": self.role.name,
            "length": len(self),
            "sampled": self.is_sampled,
            "turn": self.turn,
            "tool": self.tool,
            "branch": self.branch,
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rollout has no reward although the policy did nothing wrong."""

    phase: str  # "reset", "sample", "step", "score"
    error: str  # class name
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The record of one rollout.

    Mostly one history that only grew. Where history had to be rewritten (a chat template that drops earlier
    thinking, say), a new branch begins, a sequence of its own: what it takes over is CONTEXT there, so that
    every action and every observation is trained once, where the policy met it.

    ``reward`` is None exactly when the rollout has none: it failed, or nobody scores it. It never
    stands in for a broken sandbox. ``stats`` are counts and seconds measured on the way.
    """

    task_id: str
    sample_index: int
    segments: tuple[Segment, ...]
    messages: tuple[Mapping[str, Any], ...] = ()
    reward: float | None = None
    stop_reason: StopReason = StopReason.SUBMITTED
    policy_version: int = 0
    failure: Failure | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [segment.branch for segment in self.segments]
        if numbers and (numbers[0] != 0 or any(b - a not in (0, 1) for a, b in pairwise(numbers))):
            raise ValueError(f"branches of {self.task_id} are {numbers[:8]}; they count up from 0, in order")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"reward={self.reward} of {self.task_id} is not finite; use None where there is no reward")
        failed = self.stop_reason is StopReason.FAILED
        if failed != (self.failure is not None):
            raise ValueError(
                f"stop_reason={self.stop_reason.value!r} with failure={self.failure}: "
                "a failed rollout says why, and only a failed one does"
            )
        if failed and self.reward is not None:
            raise ValueError(
                f"a failed rollout has no reward, got {self.reward}; "
                "an infrastructure failure is not a score of 0, so pass reward=None"
            )

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def branches(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of each history, in order."""
        return tuple(tuple(run) for _, run in groupby(self.segments, key=lambda segment: segment.branch))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of all branches, one after the other."""
        return tuple(token for segment in self.segments for token in segment.token_ids)

    @property
    def roles(self) -> tuple[TokenRole, ...]:
        return tuple(segment.role for segment in self.segments for _ in segment.token_ids)

    @property
    def logprobs(self) -> tuple[float | None, ...]:
        """Sampling logprobs in nats, one a token; None where the token was not sampled."""
        return tuple(x for segment in self.segments for x in (segment.logprobs or (None,) * len(segment)))

    @property
    def actions(self) -> tuple[tuple[Segment, ...], ...]:
        """The ACTION segments of each turn, in order; mostly one a turn."""
        written = [segment for segment in self.segments if segment.role is TokenRole.ACTION]
        return tuple(tuple(run) for _, run in groupby(written, key=lambda segment: segment.turn))

    @property
    def num_turns(self) -> int:
        return len(self.actions)

    @property
    def num_unsampled_turns(self) -> int:
        """Turns in which no token was sampled, so that the policy term has nothing to learn from them."""
        return sum(not any(segment.is_sampled for segment in action) for action in self.actions)

    def count(self, role: TokenRole) -> int:
        """Tokens of one role."""
        return sum(len(segment) for segment in self.segments if segment.role is role)

    def spans(self) -> Iterator[tuple[int, int, Segment]]:
        """Each segment with its first and one-past-last token position."""
        ends = accumulate(len(segment) for segment in self.segments)
        for end, segment in zip(ends, self.segments, strict=True):
            yield end - len(segment), end, segment


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """The trajectories of one task under one policy version: the unit of a group-relative baseline."""

    task_id: str
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"group of task {self.task_id!r} holds no trajectory; a group needs at least one")
        strangers = {t.task_id for t in self.trajectories} - {self.task_id}
        if strangers:
            raise ValueError(f"group of task {self.task_id!r} holds trajectories of {sorted(strangers)}")
        versions = {t.policy_version for t in self.trajectories}
        if len(versions) > 1:
            raise ValueError(
                f"group of task {self.task_id!r} mixes policy versions {sorted(versions)}; "
                "a baseline compares attempts of one policy"
            )

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    @property
    def policy_version(self) -> int:
        return self.trajectories[0].policy_version

    @property
    def rewards(self) -> tuple[float | None, ...]:
        return tuple(t.reward for t in self.trajectories)


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """One trajectory's weights in the loss of the step that trained on it: one number a token, over all branches.

    Each is minus d(loss)/d(logprob) of a cross-entropy, and of a policy that is still the one that sampled.
    """

    advantage: float | None  # None where the policy term left the trajectory out: no reward, or too stale
    policy: tuple[float, ...]  # policy_coeff * p_t * advantage: its sign says whether the token is made more likely
    world: tuple[float, ...]  # world_model_coeff * w_t
