"""The expected gradient of every token, in plain Python floats from the formulas of docs/objective.md alone.

Nothing here calls the objective that it judges: no tensors, no masks, no shared helpers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from backtalk.engines.conformance.batch import Row, Run
from backtalk.engines.conformance.table import logprob
from backtalk.objective.config import ObjectiveConfig
from backtalk.trajectory import TokenRole

Rows = tuple[tuple[Row, ...], ...]
_BODY = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)
_TARGETS = {
    "env_only": (TokenRole.ENV_OUTPUT,),
    "warning_only": (TokenRole.WARNING,),
    "warning_plus_env": _BODY,
    "full_observation": (*_BODY, TokenRole.TEMPLATE),
}


class Expected:
    """The weights and gradients of a step over all rows, from the settings that it reads."""

    def __init__(self, groups: Rows, config: ObjectiveConfig) -> None:
        self.config = config
        self.rows = [row for group in groups for row in group]
        self.advantages = [a for group in groups for a in _advantages([row.reward for row in group])]

    def gradients(self) -> list[list[float]]:
        """Return d(loss)/d(logprob) of each token, one list for each branch of each row."""
        return [
            [0.0, *[g for _, g in self._branch(row, i, branch)][1:]]
            for i, row in enumerate(self.rows)
            for branch in row.branches
        ]

    def effective_obs_weight(self) -> float:
        """Return the mean weight of a target token over that of an action token of a row with a reward."""
        world = [self.world_weight(row, run) for row in self.rows for run in _runs(row) for _ in run.token_ids]
        policy = [self.policy_weight(row, run) for row in self.rows for run in _runs(row) for _ in run.token_ids]
        world, policy = [w for w in world if w], [p for p in policy if p]
        return self.config.world_coeff * math.fsum(world) / len(world) / (math.fsum(policy) / len(policy))

    def policy_weight(self, row: Row, run: Run) -> float:
        """Return p_t of the tokens of a run."""
        if run.old_logprobs is None or row.reward is None:
            return 0.0
        match self.config.policy_normalizer:
            case "sequence_mean":
                return 1 / (len(self.rows) * _sampled(row))
            case "token_mean":
                return 1 / sum(map(_sampled, self.rows))
            case _:
                return 1 / (len(self.rows) * (self.config.max_seq_len or 0))

    def world_weight(self, row: Row, run: Run) -> float:
        """Return w_t of the tokens of a run."""
        if not self._is_target(run):
            return 0.0
        divisor = {
            "sequence_mean": len(self.rows) * self._observed(row),
            "sequence_mean_selected": len(self.rows) * self._targets(row),
            "token_mean": sum(map(self._targets, self.rows)),
            "fixed_length": len(self.rows) * (self.config.max_seq_len or 0),
        }[self.config.world_normalizer]
        scale = (self.config.world.weights or {}).get(run.role.name.lower(), 1.0)
        return scale / divisor

    def _branch(self, row: Row, index: int, branch: Sequence[Run]) -> Iterator[tuple[int, float]]:
        """Yield each token of a branch with its gradient."""
        before = 0
        for run in branch:
            for t, token in enumerate(run.token_ids):
                world = -self.config.world_coeff * self.world_weight(row, run)
                weight = self.policy_weight(row, run)
                policy = 0.0
                if weight and run.old_logprobs is not None:
                    ratio = math.exp(logprob(before, token) - run.old_logprobs[t])
                    policy = -weight * self._slope(ratio, self.advantages[index])
                yield token, self.config.policy_coeff * policy + world
                before = token

    def _slope(self, ratio: float, advantage: float) -> float:
        """Return d/d(logprob) of min(r A, clip(r) A): r A where the minimum is not the clipped constant."""
        low, high = self.config.clip
        if (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low):
            return 0.0
        return ratio * advantage

    def _is_target(self, run: Run) -> bool:
        scale = (self.config.world.weights or {}).get(run.role.name.lower(), 1.0)
        return run.role in _TARGETS[self.config.world_loss_target] and run.turn is not None and scale > 0

    def _targets(self, row: Row) -> int:
        return sum(len(run.token_ids) for run in _runs(row) if self._is_target(run))

    def _observed(self, row: Row) -> int:
        """Count |O_i|; with full_observation the scaffold after the first action counts too."""
        roles = _TARGETS["full_observation"] if self.config.world_loss_target == "full_observation" else _BODY
        return sum(len(run.token_ids) for run in _runs(row) if run.role in roles and run.turn is not None)


def _runs(row: Row) -> Iterator[Run]:
    return (run for branch in row.branches for run in branch)


def _sampled(row: Row) -> int:
    return sum(len(run.token_ids) for run in _runs(row) if run.old_logprobs is not None)


def _advantages(rewards: Sequence[float | None]) -> list[float]:
    """Return (r - mean) / (std + 1e-6) among known rewards, with the std of n - 1."""
    known = [r for r in rewards if r is not None]
    mean = sum(known) / len(known)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1))
    return [0.0 if r is None else (r - mean) / (deviation + 1e-6) for r in rewards]
