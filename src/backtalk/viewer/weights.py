"""What each token of a step weighed in the loss, worked out again from the record alone, in plain floats.

The formulas are those of ``backtalk.objective``; a test holds the two equal. B rows of the step, A_i action
tokens of row i, O_i its observation tokens (the scaffold too where that is a target), O'_i its target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backtalk.objective.advantages import group_advantages
from backtalk.objective.config import ObjectiveConfig, WorldNormalizer
from backtalk.objective.selection import is_target_role, world_scales
from backtalk.settings import build
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup

OBSERVATION = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)


@dataclass(frozen=True, slots=True)
class RowWeights:
    """One trajectory's part in a step. The lists have one number a token."""

    advantage: float
    policy: list[float]  # policy_coeff * p_t * advantage: its sign says whether the token was made more or less likely
    world: list[float]  # world_model_coeff * w_t


def step_objective(config: Mapping[str, Any], step: int) -> ObjectiveConfig:
    """The objective of a training step, from a run's settings."""
    tree = {**config["objective"], "max_seq_len": config["rollout"]["max_tokens"]}
    return build(ObjectiveConfig, tree, "objective.").at(step)


def step_weights(groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig) -> list[list[RowWeights]]:
    """Weights of every token of a training step, in the order of groups and rows."""
    scales = {id(row): s for group in groups for row, s in zip(group, _group_scales(group, objective), strict=True)}
    rows = [row for group in groups for row in group]
    all_actions = sum(map(_sampled, rows))
    all_targets = sum(scale > 0 for row in scales.values() for scale in row)
    length = objective.max_seq_len or 0

    def weights(row: Trajectory, advantage: float) -> RowWeights:
        scale, actions = scales[id(row)], _sampled(row)
        targets = sum(x > 0 for x in scale)
        p = _weight(objective.policy_normalizer, len(rows), actions, 0, all_actions, length)
        w = _weight(objective.world_normalizer, len(rows), _observed(row, objective), targets, all_targets, length)
        p *= objective.policy_coeff * (advantage if row.reward is not None else 0.0)
        policy = [0.0 if x is None else p for x in row.logprobs]
        return RowWeights(advantage, policy, [objective.world_coeff * w * x for x in scale])

    return [
        [
            weights(row, advantage)
            for row, advantage in zip(
                group, group_advantages(group.rewards, estimator=objective.policy.advantage), strict=True
            )
        ]
        for group in groups
    ]


def _group_scales(group: TrajectoryGroup, objective: ObjectiveConfig) -> list[list[float]]:
    """s_t of target tokens, 0 elsewhere."""
    scales = []
    for row, scale in zip(group, world_scales(group, objective), strict=True):
        is_target = [is_target_role(segment, objective) for segment in row.segments for _ in segment.token_ids]
        scales.append([x * t for x, t in zip(scale or [1.0] * len(is_target), is_target, strict=True)])
    return scales


def _sampled(row: Trajectory) -> int:
    return sum(x is not None for x in row.logprobs)


def _observed(row: Trajectory, objective: ObjectiveConfig) -> int:
    scaffold = objective.world_loss_target == "full_observation"
    return sum(len(s) for s in row.segments if s.role in OBSERVATION or (scaffold and is_target_role(s, objective)))


def _weight(
    normalizer: WorldNormalizer, rows: int, row_tokens: int, row_selected: int, all_selected: int, length: int
) -> float:
    match normalizer:
        case "sequence_mean":
            return 1.0 / (rows * max(row_tokens, 1))
        case "sequence_mean_selected":
            return 1.0 / (rows * max(row_selected, 1))
        case "token_mean":
            return 1.0 / max(all_selected, 1)
        case "fixed_length":
            return 1.0 / (rows * length)
