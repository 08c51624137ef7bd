"""How good a policy is, and how well it knows its world, on tasks it was not trained on.

Rollouts are those of training. The cross-entropy of ENV_OUTPUT tokens is the model's own, at temperature 1,
in nats a token, on two sets of trajectories: recorded ones of another policy, the same before and after, and
the policy's own. Own rollouts change as the policy does, so only the recorded ones compare like with like.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backtalk.engines.base import Engine
from backtalk.language.renderer import Renderer
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.selection import SOLVED_REWARD
from backtalk.rollout.groups import EnvFactory, run_groups
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.estimates import Interval, mean, pass_at_k, ratio_interval
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, Trajectory, TrajectoryGroup

if TYPE_CHECKING:  # a study is read, and refused, without PyTorch
    from backtalk.objective.samples import Sample

COUNTED_STATS = ("num_turns", "invalid_calls", "truncated_observations", "command_timeouts")
SANDBOX_STATS = ("reset_seconds", "env_seconds", "score_seconds")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one task contributed; enough to compare two evaluations task by task."""

    task_id: str
    rollouts: int
    scored: int  # rollouts with a reward
    solved: int
    reward_sum: float
    env_nats: float  # summed over ENV_OUTPUT tokens of the policy's own rollouts
    env_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedResult:
    """Cross-entropy on the recorded trajectories of one task."""

    task_id: str
    env_nats: float
    env_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One measurement of one policy. Cross-entropies are in nats per ENV_OUTPUT token; None where nothing was seen."""

    step: int  # training steps the policy had seen
    samples_per_task: int
    pass_at_1: Interval | None
    pass_at_k: Interval | None  # k is samples_per_task
    reward: Interval | None
    env_ce_recorded: Interval | None
    env_ce_own: Interval | None
    per_rollout: dict[str, float]  # means of turns, invalid calls, truncated observations, timed-out commands
    stop_reasons: dict[str, int]
    no_reward: int  # rollouts without a reward: the world broke, or time ran out
    seconds: float
    tasks: tuple[TaskResult, ...]
    recorded: tuple[RecordedResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as evaluation_step_*.json holds it."""
        return dataclasses.asdict(self)


async def evaluate(
    engine: Engine,
    tasks: Sequence[Task],
    open_env: EnvFactory,
    renderer: Renderer,
    *,
    limits: RolloutLimits,
    params: SamplingParams,
    samples_per_task: int,
    recorded: Sequence[Trajectory] = (),
    step: int = 0,
    key: str = "evaluate",
) -> tuple[Evaluation, list[TrajectoryGroup]]:
    """Run ``samples_per_task`` rollouts of each task and score every text with the policy as it stands.

    The same ``key`` and ``params.seed`` draw with the same random numbers, so that a comparison before and
    after is a paired one. Returns the measurement and the trajectories it rests on. Slow rollouts have their time
    here (no ``straggler_factor``): to end them would measure the quick ones.
    """
    started, limits = time.monotonic(), dataclasses.replace(limits, straggler_factor=None)
    sampler = engine.sampler(params)
    groups = await run_groups(tasks, open_env, sampler, renderer, limits, group_size=samples_per_task, key=key)
    rollouts = [trajectory for group in groups for trajectory in group]
    own = dict(zip(map(id, rollouts), await env_nats(engine, rollouts), strict=True))
    results = tuple(_task_result(group, [own[id(t)] for t in group]) for group in groups)
    known = _recorded_results(recorded, await env_nats(engine, recorded))
    return Evaluation(
        step=step,
        samples_per_task=samples_per_task,
        pass_at_1=_mean_pass(results, 1),
        pass_at_k=_mean_pass(results, samples_per_task),
        reward=ratio_interval([(r.reward_sum, r.scored) for r in results]),
        env_ce_recorded=ratio_interval([(r.env_nats, r.env_tokens) for r in known]),
        env_ce_own=ratio_interval([(r.env_nats, r.env_tokens) for r in results]),
        per_rollout={name: mean([t.stats.get(name, 0.0) for t in rollouts]) for name in COUNTED_STATS},
        stop_reasons=dict(Counter(t.stop_reason.value for t in rollouts)),
        no_reward=sum(t.reward is None for t in rollouts),
        seconds=time.monotonic() - started,
        tasks=results,
        recorded=known,
    ), groups


async def env_nats(engine: Engine, trajectories: Sequence[Trajectory]) -> list[tuple[float, int]]:
    """Summed negative log-likelihood in nats, and number, of each trajectory's ENV_OUTPUT tokens, at temperature 1."""
    if not trajectories:
        return []
    found = []
    for trajectory, logprobs in zip(trajectories, await engine.score(list(trajectories)), strict=True):
        said = [x for x, role in zip(logprobs, trajectory.roles, strict=True) if role is TokenRole.ENV_OUTPUT]
        found.append((-sum(said), len(said)))
    return found


def _task_result(group: TrajectoryGroup, nats: Sequence[tuple[float, int]]) -> TaskResult:
    rewards = [t.reward for t in group if t.reward is not None]
    return TaskResult(
        task_id=group.task_id,
        rollouts=len(group),
        scored=len(rewards),
        solved=sum(reward >= SOLVED_REWARD for reward in rewards),
        reward_sum=float(sum(rewards)),
        env_nats=sum(n for n, _ in nats),
        env_tokens=sum(count for _, count in nats),
    )


def _recorded_results(recorded: Sequence[Trajectory], nats: Sequence[tuple[float, int]]) -> tuple[RecordedResult, ...]:
    totals: dict[str, tuple[float, int]] = {}
    for trajectory, (n, count) in zip(recorded, nats, strict=True):
        before = totals.get(trajectory.task_id, (0.0, 0))
        totals[trajectory.task_id] = (before[0] + n, before[1] + count)
    return tuple(RecordedResult(task_id=t, env_nats=n, env_tokens=count) for t, (n, count) in totals.items())


def _mean_pass(results: Sequence[TaskResult], k: int) -> Interval | None:
    """Tasks with fewer than k scored rollouts cannot say, and are left out."""
    return ratio_interval([(pass_at_k(r.scored, r.solved, k), 1.0) for r in results if r.scored >= k])


# ---------------------------------------------------------------- what a step's rollouts look like


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Plain numbers about the rollouts of one step; means are over those that have the thing in question."""
    rollouts = [trajectory for group in groups for trajectory in group]
    rewards = [t.reward for t in rollouts if t.reward is not None]
    turns, confused = (sum(t.stats.get(name, 0.0) for t in rollouts) for name in ("num_turns", "role_confusions"))
    spread = [len({r for r in group.rewards if r is not None}) > 1 for group in groups]
    per_rollout = {name: mean([t.stats.get(name, 0.0) for t in rollouts]) for name in COUNTED_STATS}
    return {
        "reward": mean(rewards),
        "solved": mean([float(reward >= SOLVED_REWARD) for reward in rewards]),
        "rollouts": len(rollouts),
        "no_reward": len(rollouts) - len(rewards),
        "failed": sum(t.failure is not None for t in rollouts),
        "retries": sum(t.stats.get("retries", 0.0) for t in rollouts),
        "role_confusion": confused / turns if turns else math.nan,  # share of turns that hold an observation's format
        "groups_with_signal": sum(spread),  # the others have advantage 0 and teach through the world term alone
        **per_rollout,
        **{
            f"stop_reason/{reason.value}": mean([float(t.stop_reason is reason) for t in rollouts])
            for reason in StopReason
        },
    }


def row_metrics(samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
    """Plain numbers about the rows of one update: how old, how many too old for the policy term, what length cost."""
    rows = [sample for sample in samples if sample.branch == 0]
    return {
        "staleness": max((row.staleness for row in rows), default=0),
        "stale_rows": sum(row.staleness > config.policy.max_staleness for row in rows),
        "length_penalty": mean([row.length_penalty for row in rows if row.has_reward]),
    }


def time_metrics(groups: Sequence[TrajectoryGroup], rollout_seconds: float, train_seconds: float) -> dict[str, float]:
    """Where a step's time went.

    Rollouts overlap, so sampling and sandbox are shares of the time that they spent in all; waiting for siblings
    at the sampler counts as sampling.
    """
    rollouts = [trajectory for group in groups for trajectory in group]
    sampling = sum(t.stats.get("sample_seconds", 0.0) for t in rollouts)
    sandbox = sum(t.stats.get(name, 0.0) for t in rollouts for name in SANDBOX_STATS)
    tokens = sum(len(t) for t in rollouts)
    actions = sum(t.count(TokenRole.ACTION) for t in rollouts)
    whole = max(rollout_seconds + train_seconds, 1e-9)
    return {
        "rollout_seconds": rollout_seconds,
        "train_seconds": train_seconds,
        "sampling_share": sampling / max(sampling + sandbox, 1e-9),
        "sandbox_share": sandbox / max(sampling + sandbox, 1e-9),
        "tokens_per_second": tokens / whole,
        "action_tokens_per_second": actions / max(rollout_seconds, 1e-9),
    }
