"""Trajectories as tensors: samples, the step's token counts, and padded micro-batches.

A trajectory is one row of the objective. Mostly it is one sample; where its history was rewritten it has several
branches, a sample each, and every sample knows what the whole row holds, because means are taken over rows.

B samples, T tokens. *_BT is [B, T], *_B is [B]; the fields of a Sample are [T].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.advantages import group_advantages
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.selection import world_scales
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup, WorldLossTarget, is_target


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``end`` (exclusive) of a sample: one segment of its trajectory."""

    start: int
    end: int
    role: TokenRole
    turn: int | None = None
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Numbers of tokens that means over a row divide by."""

    actions: int = 0  # A: sampled actions
    observations: int = 0  # O: environment output and warnings
    scaffold: int = 0  # template tokens after an action
    targets: int = 0  # O': those of the observations that the world-model term learns

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One branch of a trajectory as tensors of one length T.

    ``has_reward`` False (the rollout failed, ran into its deadline, is too stale, or nobody scores it): the
    row carries the world-model term alone. ``temperature`` is the one its actions were drawn at.
    ``world_scale`` multiplies the weight of target tokens; where it is 0 a token is none.
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
    elsewhere: RowCounts = RowCounts()  # what the row holds in its other branches
    spans: tuple[Span, ...] = field(default=(), repr=False)
    temperature: float = 1.0
    task_id: str = ""
    sample_index: int = 0
    policy_version: int = 0
    staleness: int = 0  # updates since that version
    length_penalty: float = 0.0  # taken off the reward before advantages

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
            raise ValueError("a token that is no ACTION is marked as sampled; only actions are")

    def __len__(self) -> int:
        return len(self.token_ids)

    def targets(self, target: WorldLossTarget) -> Tensor:
        """Which tokens the world-model term learns, O'; bool [T]."""
        chosen = targets_of(self.roles, self.turns, target)
        return chosen if self.world_scale is None else chosen & (self.world_scale > 0)

    def counts(self, target: WorldLossTarget) -> RowCounts:
        """Of this sample's own tokens."""
        return RowCounts(
            actions=int(self.sampled.sum()),
            observations=int(is_observation(self.roles).sum()),
            scaffold=int(is_scaffold(self.roles, self.turns).sum()),
            targets=int(self.targets(target).sum()),
        )


def build_samples(
    group: TrajectoryGroup,
    config: ObjectiveConfig | None = None,
    *,
    temperature: float = 1.0,
    policy_version: int | None = None,
) -> list[Sample]:
    """The samples of a group, one for each branch of each trajectory, failed ones too.

    ``temperature`` is the sampler's. At 0 (greedy) there is no distribution to take a ratio in, so it
    is refused with ConfigError. ``policy_version`` is the one about to learn, None the one that sampled: where it is
    more than ``policy.max_staleness`` ahead, the group carries the world-model term alone.
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
    penalties = [config.policy.length_penalty.of(length) for length in lengths]
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
        if len(branches) > 1:
            own = [branch.counts(config.world_loss_target) for branch in branches]
            row = reduce(add, own)
            branches = [replace(branch, elsewhere=row - counts) for branch, counts in zip(branches, own, strict=True)]
        samples += branches
    return samples


def _staleness(group: TrajectoryGroup, policy_version: int | None) -> int:
    staleness = 0 if policy_version is None else policy_version - group.policy_version
    if staleness < 0:
        raise ValueError(
            f"group of task {group.task_id!r} was sampled by policy version {group.policy_version}, and version "
            f"{policy_version} is to learn from it; pass the version that the engine is at"
        )
    return staleness


def to_samples(trajectory: Trajectory, *, advantage: float = 0.0, temperature: float = 1.0) -> list[Sample]:
    """A trajectory as tensors, a sample for each branch; one without any token where it has none."""
    return [
        _branch_sample(trajectory, number, segments, advantage, temperature)
        for number, segments in enumerate(trajectory.branches or ((),))
    ]


def _branch_sample(
    trajectory: Trajectory, number: int, segments: Sequence[Segment], advantage: float, temperature: float
) -> Sample:
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


def is_observation(roles: Tensor) -> Tensor:
    """Which tokens are the body of an observation, O: environment output and warnings; bool."""
    return (roles == TokenRole.ENV_OUTPUT) | (roles == TokenRole.WARNING)


def is_scaffold(roles: Tensor, turns: Tensor) -> Tensor:
    """Which tokens the chat template put around observations, the generation prompt too; bool."""
    return (roles == TokenRole.TEMPLATE) & (turns >= 0)


def targets_of(roles: Tensor, turns: Tensor, target: WorldLossTarget) -> Tensor:
    """Return which tokens have a role that the world-model term learns, by ``is_target``; bool, shape of ``roles``."""
    learned = [[is_target(role, turn, target) for role in TokenRole] for turn in (None, 0)]
    return torch.tensor(learned, device=roles.device)[(turns >= 0).long(), roles.long()]


def roles_from_masks(env_mask_BT: Tensor, warning_mask_BT: Tensor, *, shape: torch.Size) -> Tensor:
    """Roles from two disjoint bool masks of ``shape`` [B, T]; every other token is CONTEXT. int8 [B, T]."""
    if not env_mask_BT.dtype == warning_mask_BT.dtype == torch.bool:
        raise ValueError(f"masks must be bool, got {env_mask_BT.dtype} and {warning_mask_BT.dtype}; use mask.bool()")
    if not env_mask_BT.shape == warning_mask_BT.shape == shape or len(shape) != 2:
        raise ValueError(
            f"logprobs {tuple(shape)}, env mask {tuple(env_mask_BT.shape)} and warning mask "
            f"{tuple(warning_mask_BT.shape)} must share one shape [B, T]"
        )
    if (env_mask_BT & warning_mask_BT).any():
        raise ValueError("a token is in both masks; environment output and harness warnings exclude each other")
    roles_BT = torch.zeros_like(env_mask_BT, dtype=torch.int8)
    return roles_BT.masked_fill(env_mask_BT, TokenRole.ENV_OUTPUT).masked_fill(warning_mask_BT, TokenRole.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """What the denominators of one optimizer step are made of, over all its rows, however it is split.

    Every row counts, also one without a reward, an action or an observation: such a row adds 0 to a
    term and stays in its mean, as a row of advantage 0 does, so a failure changes no other row's weight.
    """

    sequences: int  # rows, whatever their number of branches
    rewarded_sequences: int
    action_tokens: int  # sampled ones
    policy_tokens: int  # action tokens of rows that have a reward
    env_output_tokens: int
    warning_tokens: int
    target_tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample], target: WorldLossTarget = "env_only") -> TokenCounts:
        """Count the rows and tokens of a whole optimizer step."""

        def count(role: TokenRole) -> int:
            return sum(int((s.roles == role).sum()) for s in samples)

        actions = [int(sample.sampled.sum()) for sample in samples]
        return cls(
            sequences=sum(sample.branch == 0 for sample in samples),
            rewarded_sequences=sum(sample.branch == 0 and sample.has_reward for sample in samples),
            action_tokens=sum(actions),
            policy_tokens=sum(n for n, sample in zip(actions, samples, strict=True) if sample.has_reward),
            env_output_tokens=count(TokenRole.ENV_OUTPUT),
            warning_tokens=count(TokenRole.WARNING),
            target_tokens=sum(int(sample.targets(target).sum()) for sample in samples),
        )

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Of both: what data-parallel ranks hold together."""
        return TokenCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples padded on the right. Padding has role CONTEXT and turn -1, so nothing selects it.

    ``*_elsewhere_B`` count tokens of the same row in other samples.
    """

    token_ids_BT: Tensor  # int64
    roles_BT: Tensor  # int8
    turns_BT: Tensor  # int32
    sampled_BT: Tensor  # bool, sampled actions: the only ones that the policy term reads
    sampling_logprobs_BT: Tensor  # float32 nats
    world_scale_BT: Tensor  # float32
    advantages_B: Tensor  # float32
    has_reward_B: Tensor  # bool
    temperatures_B: Tensor  # float32
    lengths_B: Tensor  # int64
    actions_elsewhere_B: Tensor  # int64
    observations_elsewhere_B: Tensor  # int64
    scaffold_elsewhere_B: Tensor  # int64
    targets_elsewhere_B: Tensor  # int64
    reference_logprobs_BT: Tensor | None = None  # float32 nats, of the reference policy; only the KL term reads it

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: column.to(device) for name, column in columns.items() if column is not None})


def collate(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Pad samples on the right to the longest."""
    if not samples:
        raise ValueError("collate got no samples; a batch needs at least one row")

    def pad(rows: Iterable[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

    return Batch(
        token_ids_BT=pad((s.token_ids for s in samples), pad_token_id),
        roles_BT=pad((s.roles for s in samples), TokenRole.CONTEXT),
        turns_BT=pad((s.turns for s in samples), -1),
        sampled_BT=pad((s.sampled for s in samples), 0),
        sampling_logprobs_BT=pad((s.sampling_logprobs for s in samples), 0),
        world_scale_BT=pad((torch.ones(len(s)) if s.world_scale is None else s.world_scale for s in samples), 0),
        advantages_B=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        has_reward_B=torch.tensor([s.has_reward for s in samples]),
        temperatures_B=torch.tensor([s.temperature for s in samples], dtype=torch.float32),
        lengths_B=torch.tensor([len(s) for s in samples], dtype=torch.int64),
        actions_elsewhere_B=torch.tensor([s.elsewhere.actions for s in samples]),
        observations_elsewhere_B=torch.tensor([s.elsewhere.observations for s in samples]),
        scaffold_elsewhere_B=torch.tensor([s.elsewhere.scaffold for s in samples]),
        targets_elsewhere_B=torch.tensor([s.elsewhere.targets for s in samples]),
    )


def policy_tokens(batch: Batch) -> Tensor:
    """Tokens of the policy term: sampled actions of rows that have a reward; bool [B, T]."""
    return batch.sampled_BT & batch.has_reward_B[:, None]


def target_tokens(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Tokens of the world-model term, O'; bool [B, T]."""
    return targets_of(batch.roles_BT, batch.turns_BT, config.world_loss_target) & (batch.world_scale_BT > 0)


def trained_tokens(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Tokens whose log-probability gets a gradient; bool [B, T]."""
    trained_BT = torch.zeros_like(batch.roles_BT, dtype=torch.bool)
    if config.policy_coeff > 0:
        trained_BT = trained_BT | policy_tokens(batch)
    if config.world_coeff > 0:
        trained_BT = trained_BT | target_tokens(batch, config)
    return trained_BT


def measured_tokens(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Tokens whose log-probability is asked for, trained or only reported; bool [B, T]."""
    target_BT = targets_of(batch.roles_BT, batch.turns_BT, config.world_loss_target)
    return batch.sampled_BT | is_observation(batch.roles_BT) | target_BT


def token_temperatures(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """What logits are divided by: actions by their sampling temperature, the rest by 1 unless tempered; [B, T]."""
    sampled_BT = batch.sampled_BT
    if config.world.temperature == "sampling":
        sampled_BT = torch.ones_like(sampled_BT)
    return torch.where(sampled_BT, batch.temperatures_B[:, None], 1.0)


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Split a step into parts of at most ``max_tokens`` padded tokens, rows of like length together.

    Longest first, ties in the order given. A row longer than ``max_tokens`` gets a part of its own. Rows
    without any token are left out: they have nothing to compute and are in ``TokenCounts`` already.
    """
    parts: list[list[Sample]] = []
    for sample in sorted((s for s in samples if len(s)), key=len, reverse=True):
        if parts and len(parts[-1][0]) * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(sample)
        else:
            parts.append([sample])
    return parts
