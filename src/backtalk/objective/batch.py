"""Samples as padded batches, the token counts of an optimizer step, and the masks that the objective reads.

B samples, T tokens. *_BT is [B, T], *_B is [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.roles import WorldLossTarget, has_target_role, is_observation
from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenRole


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Counts over all rows of one optimizer step, however it is split: the denominators of the objective.

    Every row counts, also one without a reward, an action or an observation. Such a row adds 0 to a term and stays in
    its mean, as a row of advantage 0 does, so a failed rollout changes no other row's weight.
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
            return sum(int((s.roles == role).sum()) for s in samples if not s.is_control)

        actions = [int(sample.sampled.sum()) for sample in samples]
        return cls(
            sequences=sum(sample.branch == 0 for sample in samples),
            rewarded_sequences=sum(sample.branch == 0 and sample.has_reward for sample in samples),
            action_tokens=sum(actions),
            policy_tokens=sum(n for n, sample in zip(actions, samples, strict=True) if sample.has_reward),
            env_output_tokens=count(TokenRole.ENV_OUTPUT),
            warning_tokens=count(TokenRole.WARNING),
            target_tokens=sum(int(sample.target_mask(target).sum()) for sample in samples),
        )

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Add the counts of another data-parallel rank."""
        return TokenCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples padded on the right. Padding has role CONTEXT and turn -1, so no term selects it.

    ``other_*_B`` count the tokens of the same row in its other branches, which are samples of their own.
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
    other_actions_B: Tensor  # int64
    other_observations_B: Tensor  # int64
    other_scaffold_B: Tensor  # int64
    other_targets_B: Tensor  # int64
    reference_logprobs_BT: Tensor | None = None  # float32 nats, of the reference policy; only the KL term reads it

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to another device."""
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
        other_actions_B=torch.tensor([s.other_branches.actions for s in samples]),
        other_observations_B=torch.tensor([s.other_branches.observations for s in samples]),
        other_scaffold_B=torch.tensor([s.other_branches.scaffold for s in samples]),
        other_targets_B=torch.tensor([s.other_branches.targets for s in samples]),
    )


def policy_mask(batch: Batch) -> Tensor:
    """Return the tokens of the policy term: sampled actions of rows that have a reward; bool [B, T]."""
    return batch.sampled_BT & batch.has_reward_B[:, None]


def target_mask(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Return the tokens of the world-model term, O'; bool [B, T]."""
    return has_target_role(batch.roles_BT, batch.turns_BT, config.world_loss_target) & (batch.world_scale_BT > 0)


def trained_mask(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Return the tokens whose log-probability gets a gradient; bool [B, T]."""
    trained_BT = torch.zeros_like(batch.roles_BT, dtype=torch.bool)
    if config.policy_coeff > 0:
        trained_BT = trained_BT | policy_mask(batch)
    if config.world_coeff > 0:
        trained_BT = trained_BT | target_mask(batch, config)
    return trained_BT


def measured_mask(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Return the tokens whose log-probability is needed, for training or for a metric; bool [B, T]."""
    target_BT = has_target_role(batch.roles_BT, batch.turns_BT, config.world_loss_target)
    return batch.sampled_BT | is_observation(batch.roles_BT) | target_BT


def token_temperatures(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """Return the temperature of each token: the sampling temperature on sampled actions, else 1; [B, T].

    With ``world.temperature="sampling"`` every token gets the sampling temperature.
    """
    tempered_BT = batch.sampled_BT
    if config.world.temperature == "sampling":
        tempered_BT = torch.ones_like(tempered_BT)
    return torch.where(tempered_BT, batch.temperatures_B[:, None], 1.0)
