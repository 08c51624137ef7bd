"""Trajectories as tensors: samples, the step's token counts, and padded micro-batches.

B sequences, T tokens. *_BT is [B, T], *_B is [B]; the fields of a Sample are [T].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from backtalk.advantages import group_advantages
from backtalk.errors import ConfigError
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup

WorldLossTarget = Literal["env_only", "warning_only", "warning_plus_env", "full_observation"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One trajectory as tensors of one length T.

    ``has_reward`` False (the rollout failed, ran into its deadline, or nobody scores it): the row
    carries the world-model term alone. ``temperature`` is the one its actions were drawn at.
    """

    token_ids: Tensor  # int64
    roles: Tensor  # int8, TokenRole values
    turns: Tensor  # int32, -1 before the first action
    sampling_logprobs: Tensor  # float32 nats, 0 where the token was not sampled
    advantage: float
    has_reward: bool
    temperature: float = 1.0
    task_id: str = ""
    sample_index: int = 0
    policy_version: int = 0

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        lengths = (len(self.roles), len(self.turns), len(self.sampling_logprobs))
        if lengths != (n, n, n):
            raise ValueError(
                f"sample of {n} tokens has {lengths[0]} roles, {lengths[1]} turns and {lengths[2]} logprobs; "
                "every field needs one entry a token"
            )

    def __len__(self) -> int:
        return len(self.token_ids)


def build_samples(group: TrajectoryGroup, *, normalize_std: bool = True, temperature: float = 1.0) -> list[Sample]:
    """One sample for each trajectory of the group, failed ones too; advantages are the group's own.

    ``temperature`` is the sampler's. At 0 (greedy) there is no distribution to take a ratio in, so it
    is refused with ConfigError.
    """
    if temperature <= 0:
        raise ConfigError(
            f"temperature={temperature} cannot be trained on: greedy actions have no probability ratio; "
            "sample with temperature > 0, for example 1.0"
        )
    advantages = group_advantages(group.rewards, normalize_std=normalize_std)
    return [
        to_sample(trajectory, advantage=advantage, temperature=temperature)
        for trajectory, advantage in zip(group, advantages, strict=True)
    ]


def to_sample(trajectory: Trajectory, *, advantage: float = 0.0, temperature: float = 1.0) -> Sample:
    """One trajectory as tensors."""
    turns = [-1 if segment.turn is None else segment.turn for segment in trajectory.segments for _ in segment.token_ids]
    return Sample(
        token_ids=torch.tensor(trajectory.token_ids, dtype=torch.int64),
        roles=torch.tensor(trajectory.roles, dtype=torch.int8),
        turns=torch.tensor(turns, dtype=torch.int32),
        sampling_logprobs=torch.tensor(trajectory.logprobs, dtype=torch.float32),
        advantage=advantage,
        has_reward=trajectory.reward is not None,
        temperature=temperature,
        task_id=trajectory.task_id,
        sample_index=trajectory.sample_index,
        policy_version=trajectory.policy_version,
    )


def is_action(roles: Tensor) -> Tensor:
    """Which tokens the policy sampled; bool, shape of ``roles``."""
    return roles == TokenRole.ACTION


def is_observation(roles: Tensor) -> Tensor:
    """Which tokens are the body of an observation, O: environment output and warnings; bool."""
    return (roles == TokenRole.ENV_OUTPUT) | (roles == TokenRole.WARNING)


def is_target(roles: Tensor, turns: Tensor, target: WorldLossTarget) -> Tensor:
    """Which tokens the world-model term learns, O'; bool, shape of ``roles``.

    ``full_observation`` adds the scaffold that follows an action up to the next one, which holds the
    generation prompt too. The prompt (turn -1), actions and padding are never targets.
    """
    match target:
        case "env_only":
            return roles == TokenRole.ENV_OUTPUT
        case "warning_only":
            return roles == TokenRole.WARNING
        case "warning_plus_env":
            return is_observation(roles)
        case "full_observation":
            return is_observation(roles) | ((roles == TokenRole.TEMPLATE) & (turns >= 0))
    raise ConfigError(
        f"world_loss_target={target!r} is unknown; "
        "use 'env_only', 'warning_only', 'warning_plus_env' or 'full_observation'"
    )


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

    sequences: int
    rewarded_sequences: int
    action_tokens: int
    policy_tokens: int  # action tokens of rows that have a reward
    env_output_tokens: int
    warning_tokens: int
    target_tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample], target: WorldLossTarget = "env_only") -> TokenCounts:
        """Count the rows and tokens of a whole optimizer step."""

        def count(role: TokenRole, *, rewarded_only: bool = False) -> int:
            return sum(int((s.roles == role).sum()) for s in samples if s.has_reward or not rewarded_only)

        return cls(
            sequences=len(samples),
            rewarded_sequences=sum(sample.has_reward for sample in samples),
            action_tokens=count(TokenRole.ACTION),
            policy_tokens=count(TokenRole.ACTION, rewarded_only=True),
            env_output_tokens=count(TokenRole.ENV_OUTPUT),
            warning_tokens=count(TokenRole.WARNING),
            target_tokens=sum(int(is_target(s.roles, s.turns, target).sum()) for s in samples),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows padded on the right. Padding has role CONTEXT and turn -1, so nothing selects it."""

    token_ids_BT: Tensor  # int64
    roles_BT: Tensor  # int8
    turns_BT: Tensor  # int32
    sampling_logprobs_BT: Tensor  # float32 nats
    advantages_B: Tensor  # float32
    has_reward_B: Tensor  # bool
    temperatures_B: Tensor  # float32
    lengths_B: Tensor  # int64

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def collate(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest."""
    if not samples:
        raise ValueError("collate got no samples; a batch needs at least one row")

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return Batch(
        token_ids_BT=pad([s.token_ids for s in samples], pad_token_id),
        roles_BT=pad([s.roles for s in samples], TokenRole.CONTEXT),
        turns_BT=pad([s.turns for s in samples], -1),
        sampling_logprobs_BT=pad([s.sampling_logprobs for s in samples], 0),
        advantages_B=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        has_reward_B=torch.tensor([s.has_reward for s in samples]),
        temperatures_B=torch.tensor([s.temperature for s in samples], dtype=torch.float32),
        lengths_B=torch.tensor([len(s) for s in samples], dtype=torch.int64),
    )


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
