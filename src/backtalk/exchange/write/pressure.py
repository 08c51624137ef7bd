"""Translate the coefficient of the world-model term between libraries that divide by different things.

A library's *pressure* is the summed weight of all target tokens over the summed weight of all action tokens, at
coefficient 1. Two coefficients are equal where coefficient times pressure is. docs/coefficients.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from backtalk.errors import ConfigError
from backtalk.objective.advantages import AdvantageEstimator, group_advantages
from backtalk.objective.roles import WorldLossTarget, is_target
from backtalk.trajectory import TokenRole, Trajectory

# What a term divides each of its tokens by: sequence_mean by rows and the row's observations or actions,
# sequence_mean_selected by rows and the row's targets, token_mean by all its tokens, action_tokens by all action
# tokens, fixed_length by rows and the longest length, sum by nothing.
Divisor = Literal["sequence_mean", "sequence_mean_selected", "token_mean", "action_tokens", "fixed_length", "sum"]


@dataclass(frozen=True, slots=True)
class Row:
    """Token counts of one rollout, and its advantage."""

    actions: int
    observations: int  # environment output and warnings
    targets: int  # those of them that are learned
    advantage: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What a library divides each term by, and how it estimates advantages."""

    policy: Divisor
    world: Divisor
    advantage: AdvantageEstimator = "grpo"


def pressure(rows: Sequence[Row], reduction: Reduction, max_seq_len: int | None = None) -> float:
    """Return the pressure of some rows, taken as one optimizer step: sum of w_t over sum of p_t * |advantage|.

    Raises:
        ConfigError: no action has a weight, so there is nothing to compare with.
    """
    actions, targets = sum(row.actions for row in rows), sum(row.targets for row in rows)

    def weight(divisor: Divisor, own: int, row_tokens: int, all_tokens: int) -> float:
        match divisor:
            case "sum":
                return float(own)
            case "fixed_length":
                return own / (len(rows) * (max_seq_len or math.nan))
            case "sequence_mean" | "sequence_mean_selected":
                return own / (len(rows) * max(row_tokens, 1))
            case "token_mean" | "action_tokens":
                return own / max(all_tokens, 1)

    policy = sum(weight(reduction.policy, r.actions, r.actions, actions) * abs(r.advantage) for r in rows)
    if not policy:
        raise ConfigError("no action in these rollouts has a weight, so there is no policy term to compare with")
    world = 0.0
    for row in rows:
        row_tokens = row.observations if reduction.world == "sequence_mean" else row.targets
        all_tokens = actions if reduction.world == "action_tokens" else targets
        world += weight(reduction.world, row.targets, row_tokens, all_tokens)
    return world / policy


def rows_of(trajectories: Sequence[Trajectory], target: WorldLossTarget, advantage: AdvantageEstimator) -> list[Row]:
    """Return the rows of rollouts that have a reward, all rollouts if none has one.

    Rollouts of one task and policy version are a group. Where all advantages are 0 they are left out of the comparison
    (taken as 1).
    """
    scored = [t for t in trajectories if t.reward is not None] or list(trajectories)
    scored.sort(key=_group_of)
    groups = [list(group) for _, group in groupby(scored, key=_group_of)]
    advantages = [a for g in groups for a in group_advantages([t.reward for t in g], estimator=advantage)]
    if not any(advantages):
        advantages = [1.0] * len(scored)
    return [_row(t, target, advantage) for t, advantage in zip(scored, advantages, strict=True)]


def _group_of(trajectory: Trajectory) -> tuple[str, int]:
    return trajectory.task_id, trajectory.policy_version


def _row(trajectory: Trajectory, target: WorldLossTarget, advantage: float) -> Row:
    count = trajectory.count
    targets = sum(len(s) for s in trajectory.segments if is_target(s.role, s.turn, target))
    actions = sum(len(s) for s in trajectory.segments if s.is_sampled)
    bodies = count(TokenRole.ENV_OUTPUT) + count(TokenRole.WARNING)
    return Row(actions, max(bodies, targets), targets, advantage)  # full_observation counts its scaffold too
