"""Trajectories: the record of a rollout as token ids, each with a role that says who made it.

A token's role is recorded where the token is appended and never inferred later from text or chat roles. All classes
are frozen and check themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import accumulate, groupby, pairwise
from typing import Any

COPIED_RUN = 3  # tokens that an observation repeats of an action; shorter matches are mostly coincidence


class TokenRole(IntEnum):
    """The origin of a token: who wrote it."""

    CONTEXT = 0  # given text: system prompt, task instruction
    TEMPLATE = 1  # what the chat template writes around messages
    ACTION = 2  # written by the agent: a policy, a script, a person
    ENV_OUTPUT = 3  # output of the environment
    WARNING = 4  # text of the harness: format warnings, parse errors, truncation notices


class StopReason(StrEnum):
    """The reason for which a rollout ended; only FAILED means that the infrastructure broke."""

    SUBMITTED = "submitted"  # the policy finished with an answer
    ENV_DONE = "env_done"  # the environment ended the rollout
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    DEADLINE = "deadline"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one role.

    ``logprobs`` are the sampler's own, in nats, one for each token of a sampled ACTION segment, and None for all other
    roles. An ACTION with ``logprobs=None`` was not sampled (a script, a person or an imported text wrote it): the
    policy term leaves it out. ``turn`` counts from 0 and is None before the first action. ``tool`` names the tool whose
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
        """Return whether a policy sampled these tokens with known logprobs, so that the policy term may train them."""
        return self.logprobs is not None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data without token ids and logprobs, which files keep as columns of a trajectory."""
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
    """The infrastructure error that left a rollout without a reward."""

    phase: str  # "reset", "sample", "step", "score"
    error: str  # name of the exception class
    message: str
    traceback: str = field(default="", compare=False)  # the end of it, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The record of one rollout.

    Its segments are usually one history that only grew. Where the history had to be rewritten (for example by a chat
    template that drops earlier thinking), a new branch begins: a sequence of its own, in which all that it repeats is
    CONTEXT, so that each action and observation is trained once.

    ``reward`` is None if the rollout failed or has no verifier; a broken sandbox is never a reward of 0. ``stats`` are
    counts, and durations in seconds.
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
        """Return the number of tokens of all branches."""
        return sum(len(segment) for segment in self.segments)

    @property
    def branches(self) -> tuple[tuple[Segment, ...], ...]:
        """Return the segments of each branch, in order."""
        return tuple(tuple(run) for _, run in groupby(self.segments, key=lambda segment: segment.branch))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the token ids of all branches, one after the other."""
        return tuple(token for segment in self.segments for token in segment.token_ids)

    @property
    def roles(self) -> tuple[TokenRole, ...]:
        """Return the role of each token."""
        return tuple(segment.role for segment in self.segments for _ in segment.token_ids)

    @property
    def logprobs(self) -> tuple[float | None, ...]:
        """Return the sampling logprob of each token, in nats; None if it was not sampled."""
        return tuple(x for segment in self.segments for x in (segment.logprobs or (None,) * len(segment)))

    @property
    def actions(self) -> tuple[tuple[Segment, ...], ...]:
        """Return the ACTION segments of each turn, in order; usually one a turn."""
        actions = [segment for segment in self.segments if segment.role is TokenRole.ACTION]
        return tuple(tuple(run) for _, run in groupby(actions, key=lambda segment: segment.turn))

    @property
    def num_turns(self) -> int:
        """Return the number of turns."""
        return len(self.actions)

    @property
    def num_unsampled_turns(self) -> int:
        """Return the number of turns in which no token was sampled, which the policy term leaves out."""
        return sum(not any(segment.is_sampled for segment in action) for action in self.actions)

    def count(self, role: TokenRole) -> int:
        """Return the number of tokens of one role."""
        return sum(len(segment) for segment in self.segments if segment.role is role)

    def spans(self) -> Iterator[tuple[int, int, Segment]]:
        """Yield each segment with its first token position and the one past its last."""
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
        other_tasks = {t.task_id for t in self.trajectories} - {self.task_id}
        if other_tasks:
            raise ValueError(f"group of task {self.task_id!r} holds trajectories of {sorted(other_tasks)}")
        versions = {t.policy_version for t in self.trajectories}
        if len(versions) > 1:
            raise ValueError(
                f"group of task {self.task_id!r} mixes policy versions {sorted(versions)}; "
                "a baseline compares rollouts of one policy version"
            )

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    @property
    def policy_version(self) -> int:
        """Return the version of the policy that sampled all of them."""
        return self.trajectories[0].policy_version

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """Return the reward of each trajectory; None if it has none."""
        return tuple(t.reward for t in self.trajectories)


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weights of one trajectory's tokens in the loss of the step that trained on it, over all branches.

    A weight is minus d(loss)/d(logprob): exact for the cross-entropy, and for the policy term at ratio 1, where the
    policy is still the one that sampled.
    """

    advantage: float | None  # None if the policy term left the trajectory out: no reward, or too stale
    policy: tuple[float, ...]  # policy_coeff * p_t * advantage; positive: training makes the token more likely
    world: tuple[float, ...]  # world_model_coeff * w_t


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One trajectory's tokens as a model sees them, at temperature 1, over all branches.

    ``expected`` has an entry for each token that was not the likeliest at its position: the likeliest ones with their
    log-probabilities, best first.
    """

    logprobs: tuple[float, ...]  # nats; 0.0 for the first token of a branch
    expected: Mapping[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def mean_nats(self, trajectory: Trajectory, role: TokenRole) -> float | None:
        """Return the mean cross-entropy of a role's tokens in nats; None where there are none."""
        nats = [-x for x, other in zip(self.logprobs, trajectory.roles, strict=True) if other is role]
        return sum(nats) / len(nats) if nats else None


def copied_tokens(token_ids: Sequence[int], spans: Iterable[tuple[int, int, TokenRole, int | None]]) -> list[bool]:
    """Return which observation tokens are in a run of at least 3 that is also in the same turn's action.

    Spans are first position, one past the last, role and turn. Longer runs consist of runs of 3, so only those are
    looked up, in time linear in the number of tokens.
    """
    actions: dict[int | None, set[tuple[int, ...]]] = {}
    copied = [False] * len(token_ids)
    for start, end, role, turn in spans:
        starts = range(start, end - COPIED_RUN + 1)
        if role is TokenRole.ACTION:
            actions.setdefault(turn, set()).update(tuple(token_ids[i : i + COPIED_RUN]) for i in starts)
        elif role in (TokenRole.ENV_OUTPUT, TokenRole.WARNING) and (said := actions.get(turn)):
            for i in starts:
                if tuple(token_ids[i : i + COPIED_RUN]) in said:
                    copied[i : i + COPIED_RUN] = [True] * COPIED_RUN
    return copied
