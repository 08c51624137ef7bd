"""Check and measure the rollouts of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backtalk.errors import InfrastructureError
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.selection import SOLVED_REWARD
from backtalk.run.estimates import mean
from backtalk.trajectory import StopReason, TokenRole, Trajectory, TrajectoryGroup

if TYPE_CHECKING:  # settings are read, and refused, without PyTorch
    from backtalk.objective.samples import Sample

MEAN_STATS = ("num_turns", "invalid_calls", "truncated_observations", "command_timeouts")
SANDBOX_STATS = ("reset_seconds", "env_seconds", "score_seconds")


def check_rollouts(groups: Sequence[TrajectoryGroup], name: str, *, observations_teach: bool = True) -> None:
    """Check that one of some rollouts at least left something to learn from, or to measure.

    A failed one did not. One that ended at its deadline did if it has a reward, or if the policy acted and
    ``observations_teach``. If none did, the machine or the settings are broken and not a task. ``name`` is that of the
    rollouts, as in "step 3".

    Raises:
        InfrastructureError: none did.
    """
    rollouts = [trajectory for group in groups for trajectory in group]
    failures = [t.failure for t in rollouts if t.failure is not None]
    late = [t for t in rollouts if t.stop_reason is StopReason.DEADLINE and t.reward is None]
    acted = any(t.num_turns for t in late)
    if len(failures) + len(late) < len(rollouts) or (acted and observations_teach) or not rollouts:
        return

    def share(count: int) -> str:
        return f"all {count}" if count == len(rollouts) else f"{count} of {len(rollouts)}"

    reasons, advice = [], "`backtalk doctor` says what this machine lacks. Continue with --resume once it works"
    if late:
        why = "and world_model_coeff=0 learns nothing from those" if acted else "before the policy sampled an action"
        reasons.append(f"{share(len(late))} rollouts of {name} ended at their deadline, {why}")
        advice = f"raise rollout.rollout_timeout_s, or lower rollout.concurrency or rollout.max_turns; {advice}"
    if failures:
        reasons.append(
            f"{share(len(failures))} rollouts of {name} failed, the first at {failures[0].phase} with "
            f"{failures[0].error}: {failures[0].message}"
        )
    raise InfrastructureError(f"{'; '.join(reasons)}; {advice}")


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Return metrics of a step's rollouts; means are over those that have the quantity."""
    rollouts = [trajectory for group in groups for trajectory in group]
    rewards = [t.reward for t in rollouts if t.reward is not None]
    turns, confused, cut = (
        sum(t.stats.get(name, 0.0) for t in rollouts) for name in ("num_turns", "role_confusions", "cut_after_call")
    )
    return {
        "reward": mean(rewards),
        "solved": mean([float(reward >= SOLVED_REWARD) for reward in rewards]),
        "rollouts": len(rollouts),
        "no_reward": len(rollouts) - len(rewards),
        "failed": sum(t.failure is not None for t in rollouts),
        "retries": sum(t.stats.get("retries", 0.0) for t in rollouts),
        "role_confusion": confused / turns if turns else math.nan,
        "cut_after_call": cut / turns if turns else math.nan,
        "groups_with_signal": sum(len({*group.rewards} - {None}) > 1 for group in groups),
        **mean_stats(rollouts),
        **{f"stop_reason/{end.value}": mean([float(t.stop_reason is end) for t in rollouts]) for end in StopReason},
    }


def mean_stats(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """Return the means of turns, invalid calls, truncated observations and timed-out commands."""
    return {name: mean([t.stats.get(name, 0.0) for t in rollouts]) for name in MEAN_STATS}


def row_metrics(samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
    """Return metrics of the rows of an update: their age, those too old for the policy term, the length penalty."""
    rows = [sample for sample in samples if sample.branch == 0]
    return {
        "staleness": max((row.staleness for row in rows), default=0),
        "stale_rows": sum(row.staleness > config.policy.max_staleness for row in rows),
        "length_penalty": mean([row.length_penalty for row in rows if row.has_reward]),
    }


def time_metrics(groups: Sequence[TrajectoryGroup], rollout_seconds: float, train_seconds: float) -> dict[str, float]:
    """Return the seconds of a step, and the shares of its rollouts' time.

    Rollouts overlap, so the shares of sampling and sandbox are of the time that they spent in all; waiting for siblings
    at the sampler counts as sampling.
    """
    rollouts = [trajectory for group in groups for trajectory in group]
    sampling = sum(t.stats.get("sample_seconds", 0.0) for t in rollouts)
    sandbox = sum(t.stats.get(name, 0.0) for t in rollouts for name in SANDBOX_STATS)
    both = max(sampling + sandbox, 1e-9)
    return {
        "rollout_seconds": rollout_seconds,
        "train_seconds": train_seconds,
        "sampling_share": sampling / both,
        "sandbox_share": sandbox / both,
        "tokens_per_second": sum(len(t) for t in rollouts) / max(rollout_seconds + train_seconds, 1e-9),
        "action_tokens_per_second": sum(t.count(TokenRole.ACTION) for t in rollouts) / max(rollout_seconds, 1e-9),
    }
