"""Trajectories as samples: the rows of tensors that an engine trains on, with their advantages.

A trajectory is one row of the objective. Mostly it is one sample. Where its history was rewritten it has several
branches, a sample each; every sample then counts the tokens of the other branches, because means are taken over rows.

Tensor fields of a Sample are [T], T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import sub
from typing import NamedTuple

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.advantages import group_advantages
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.roles import WorldLossTarget, has_target_role, is_observation, is_scaffold
from backtalk.objective.selection import world_scales
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``end`` (exclusive) of a sample: one segment of its trajectory."""

    start: int
    end: int
    role: TokenRole
    turn: int | None = None
    tool: str | None = None


class RowCounts(NamedTuple):
    """Token counts that a mean over a row divides by."""

    actions: int = 0  # A: sampled actions
    observations: int = 0  # O: environment output and warnings
    scaffold: int = 0  # template tokens after an action
    targets: int = 0  # O': those of the observations that the world-model term learns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One branch of a trajectory as tensors of one length T.

    ``has_reward`` is False where the rollout failed, ran into its deadline, is too stale or has no verifier: the row
    then carries the world-model term alone. ``temperature`` is that of sampling. ``world_scale`` multiplies the weight
    of target tokens; a token with scale 0 is no target.
    """

    token_ids: Tensor  # int64
    roles: Tensor  # int8, TokenRole values
    turns: Tensor  # int32, -1 before the first action
    sampled: Tensor  # bool, actions with known logprobs: the only tokens that the policy term reads
    sampling_logprobs: Tensor  # float32 nats, 0 where the token was not sampled
    advantage: float
    has_reward: bool
    world_scale: Tensor | None = None  # float32; None is 1 everywhere
    branch: int = 0
    other_branches: RowCounts = field(default_factory=RowCounts)  # tokens of the row that are in other samples
    spans: tuple[Span, ...] = field(default=(), repr=False)
    temperature: float = 1.0
    task_id: str = ""
    sample_index: int = 0
    policy_version: int = 0
    staleness: int = 0  # updates since that version
    length_penalty: float = 0.0  # taken off the reward before advantages
    is_control: bool = False  # a copy for the world-model term alone, see ``controls``

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        scales = n if self.world_scale is None else len(self.world_scale)
        lengths = (len(self.roles), len(self.turns), len(self.sampled), len(self.sampling_logprobs), scales)
        if lengths != (n,) * 5:
            raise ValueError(
                f"sample of {n} tokens has {lengths[0]} roles, {lengths[1]} turns, {lengths[2]} marks of sampled, "
                f"{lengths[3]} logprobs and {lengths[4]} world scales; every field needs one entry a token"
            )
        if (self.sampled & (self.roles != TokenRole.ACTION)).any():
            raise ValueError("a token that is no ACTION is marked as sampled; mark sampled actions alone")

    def __len__(self) -> int:
        return len(self.token_ids)

    def target_mask(self, target: WorldLossTarget) -> Tensor:
        """Return which tokens the world-model term learns, O'; bool [T]."""
        mask = has_target_role(self.roles, self.turns, target)
        return mask if self.world_scale is None else mask & (self.world_scale > 0)

    def counts(self, target: WorldLossTarget) -> RowCounts:
        """Count this sample's own tokens."""
        return RowCounts(
            actions=int(self.sampled.sum()),
            observations=int(is_observation(self.roles).sum()),
            scaffold=int(is_scaffold(self.roles, self.turns).sum()),
            targets=int(self.target_mask(target).sum()),
        )


def build_samples(
    group: TrajectoryGroup,
    config: ObjectiveConfig | None = None,
    *,
    temperature: float = 1.0,
    policy_version: int | None = None,
) -> list[Sample]:
    """Build the samples of a group with its advantages, one for each branch of each trajectory, failed ones too.

    ``temperature`` is the sampler's. ``policy_version`` is the one about to learn, None the one that sampled: where it
    is more than ``policy.max_staleness`` ahead, the group carries the world-model term alone.

    Raises:
        ConfigError: temperature 0 (greedy), at which an action has no probability ratio.
        ValueError: a group sampled by a later version than ``policy_version``.
    """
    if temperature <= 0:
        raise ConfigError(
            f"temperature={temperature} cannot be trained on: greedy actions have no probability ratio; "
            "sample with temperature > 0, for example 1.0"
        )
    config = config or ObjectiveConfig()
    staleness = _staleness(group, policy_version)
    # Tokens after the prompt; what a later branch takes over from an earlier one has no turn, and counts once.
    lengths = [sum(len(segment) for segment in trajectory.segments if segment.turn is not None) for trajectory in group]
    penalties = [config.policy.length_penalty.for_length(length) for length in lengths]
    rewards = [
        None if trajectory.reward is None or staleness > config.policy.max_staleness else trajectory.reward - penalty
        for trajectory, penalty in zip(group, penalties, strict=True)
    ]
    advantages = group_advantages(rewards, estimator=config.policy.advantage)
    samples: list[Sample] = []
    for i, (trajectory, scale) in enumerate(zip(group, world_scales(group, config), strict=True)):
        branches = [
            replace(branch, has_reward=rewards[i] is not None, staleness=staleness, length_penalty=penalties[i])
            for branch in to_samples(trajectory, advantage=advantages[i], temperature=temperature)
        ]
        if scale is not None:
            parts = torch.tensor(scale, dtype=torch.float32).split([len(branch) for branch in branches])
            branches = [replace(branch, world_scale=part) for branch, part in zip(branches, parts, strict=True)]
        samples += with_other_branches(branches, config.world_loss_target)
    return samples


def rows_of(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Yield the branches of each row; ``samples`` holds them one after the other."""
    row: list[Sample] = []
    for sample in samples:
        if sample.branch == 0 and row:
            yield row
            row = []
        row.append(sample)
    if row:
        yield row


def with_other_branches(branches: list[Sample], target: WorldLossTarget) -> list[Sample]:
    """Fill in ``other_branches`` of the samples of one row."""
    if len(branches) == 1:
        return branches
    counts = [branch.counts(target) for branch in branches]
    row = [sum(column) for column in zip(*counts, strict=True)]
    return [
        replace(branch, other_branches=RowCounts(*map(sub, row, own)))
        for branch, own in zip(branches, counts, strict=True)
    ]


def _staleness(group: TrajectoryGroup, policy_version: int | None) -> int:
    """Return the number of updates between sampling a group and learning from it."""
    staleness = 0 if policy_version is None else policy_version - group.policy_version
    if staleness < 0:
        raise ValueError(
            f"group of task {group.task_id!r} was sampled by policy version {group.policy_version}, and version "
            f"{policy_version} is to learn from it; pass the version that the engine is at"
        )
    return staleness


def to_samples(trajectory: Trajectory, *, advantage: float = 0.0, temperature: float = 1.0) -> list[Sample]:
    """Turn a trajectory into tensors, one sample for each branch; without segments, one sample without tokens."""
    return [
        _branch_sample(trajectory, number, segments, advantage, temperature)
        for number, segments in enumerate(trajectory.branches or ((),))
    ]


def _branch_sample(
    trajectory: Trajectory, number: int, segments: Sequence[Segment], advantage: float, temperature: float
) -> Sample:
    """Turn one branch of a trajectory into a sample."""
    spans: list[Span] = []
    for segment in segments:
        start = spans[-1].end if spans else 0
        spans.append(Span(start, start + len(segment), segment.role, segment.turn, segment.tool))

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype)

    return Sample(
        token_ids=column((token for s in segments for token in s.token_ids), torch.int64),
        roles=column((s.role for s in spans for _ in range(s.start, s.end)), torch.int8),
        turns=column((-1 if s.turn is None else s.turn for s in spans for _ in range(s.start, s.end)), torch.int32),
        sampled=column((s.is_sampled for s in segments for _ in s.token_ids), torch.bool),
        sampling_logprobs=column((x for s in segments for x in (s.logprobs or (0.0,) * len(s))), torch.float32),
        advantage=advantage,
        has_reward=trajectory.reward is not None,
        branch=number,
        spans=tuple(spans),
        temperature=temperature,
        task_id=trajectory.task_id,
        sample_index=trajectory.sample_index,
        policy_version=trajectory.policy_version,
    )
