"""What each token of a step weighed in the loss, worked out again from the record alone, in plain floats.

The formulas are those of ``backtalk.objective``; a test holds the two equal. B rows of the step, A_i action
tokens of row i, O_i its observation tokens (the scaffold too where that is a target), O'_i its target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backtalk.advantages import group_advantages
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup

OBSERVATION = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)


@dataclass(frozen=True, slots=True)
class RowWeights:
    """One trajectory's part in a step. The lists have one number a token."""

    advantage: float
    policy: list[float]  # policy_coeff * p_t * advantage: its sign says whether the token was made more or less likely
    world: list[float]  # world_model_coeff * w_t


def step_weights(groups: Sequence[TrajectoryGroup], config: Mapping[str, Any]) -> list[list[RowWeights]]:
    """Weights of every token of a training step, in the order of groups and rows; ``config`` is the run's."""
    objective, length = config["objective"], config["rollout"]["max_tokens"]
    rows = [trajectory for group in groups for trajectory in group]
    targets = {id(row): _targets(row, objective["world_loss_target"]) for row in rows}
    all_actions = sum(row.count(TokenRole.ACTION) for row in rows)
    all_targets = sum(sum(target) for target in targets.values())
    weights = []
    for group in groups:
        advantages = group_advantages(group.rewards)
        weights.append([])
        for row, advantage in zip(group, advantages, strict=True):
            roles, target = row.roles, targets[id(row)]
            observed = sum(role in OBSERVATION or chosen for role, chosen in zip(roles, target, strict=True))
            p = _weight(objective["policy_normalizer"], len(rows), row.count(TokenRole.ACTION), 0, all_actions, length)
            w = _weight(objective["world_normalizer"], len(rows), observed, sum(target), all_targets, length)
            p *= objective["policy_coeff"] * (advantage if row.reward is not None else 0.0)
            w *= objective["world_model_coeff"]
            weights[-1].append(
                RowWeights(
                    advantage,
                    [p if role is TokenRole.ACTION else 0.0 for role in roles],
                    [w if chosen else 0.0 for chosen in target],
                )
            )
    return weights


def _weight(normalizer: str, rows: int, row_tokens: int, row_selected: int, all_selected: int, length: int) -> float:
    match normalizer:
        case "sequence_mean":
            return 1.0 / (rows * max(row_tokens, 1))
        case "sequence_mean_selected":
            return 1.0 / (rows * max(row_selected, 1))
        case "token_mean":
            return 1.0 / max(all_selected, 1)
        case _:  # fixed_length
            return 1.0 / (rows * length)


def _targets(row: Trajectory, target: str) -> list[bool]:
    wanted = {
        "env_only": (TokenRole.ENV_OUTPUT,),
        "warning_only": (TokenRole.WARNING,),
        "warning_plus_env": OBSERVATION,
        "full_observation": (*OBSERVATION, TokenRole.TEMPLATE),
    }[target]
    return [
        segment.role in wanted and (segment.role is not TokenRole.TEMPLATE or segment.turn is not None)
        for segment in row.segments
        for _ in segment.token_ids
    ]
