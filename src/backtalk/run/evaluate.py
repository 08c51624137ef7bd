"""Evaluate a policy on held-out tasks: its rewards, and its cross-entropy on what environments answer.

Rollouts run as in training. The cross-entropy of ENV_OUTPUT tokens is the model's own, at temperature 1, in nats a
token, on two sets of trajectories: recorded ones of another policy, the same at every evaluation, and the policy's own.
Its own change with the policy, so only the recorded ones can be compared over time.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from backtalk.engines.base import Engine
from backtalk.language.renderer import Renderer
from backtalk.objective.selection import SOLVED_REWARD
from backtalk.rollout.groups import run_groups
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.rollout import EnvFactory
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.estimates import Interval, pass_at_k, ratio_interval
from backtalk.run.rollouts import mean_stats
from backtalk.tasks.task import Task
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Result of one task, so that two evaluations can be compared task by task."""

    task_id: str
    rollouts: int
    scored: int  # rollouts with a reward
    solved: int
    reward_sum: float
    env_nats: float  # summed over ENV_OUTPUT tokens of the policy's own rollouts
    env_tokens: int
    invalid_calls: float = 0.0  # turns without a valid call, summed over the rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedResult:
    """Cross-entropy on the recorded trajectories of one task."""

    task_id: str
    env_nats: float
    env_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Evaluation of one policy. Cross-entropies are in nats per ENV_OUTPUT token; None if there was no such token."""

    step: int  # training steps the policy had seen
    samples_per_task: int
    pass_at_1: Interval | None
    pass_at_k: Interval | None  # k is samples_per_task
    reward: Interval | None
    env_ce_recorded: Interval | None
    env_ce_own: Interval | None
    per_rollout: dict[str, float]  # see `mean_stats`
    stop_reasons: dict[str, int]
    no_reward: int  # rollouts without one: the environment broke, or time ran out
    seconds: float
    tasks: tuple[TaskResult, ...]
    recorded: tuple[RecordedResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as evaluation_step_*.json holds it."""
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
    """Evaluate the current policy on ``samples_per_task`` rollouts of each task; return the rollouts too.

    The same ``key`` and ``params.seed`` give the same random numbers, so that two evaluations can be compared in pairs.
    ``straggler_factor`` is ignored: to end slow rollouts would measure the quick ones.
    """
    started, limits = time.monotonic(), dataclasses.replace(limits, straggler_factor=None)
    sampler = engine.sampler(params)
    groups = await run_groups(tasks, open_env, sampler, renderer, limits, group_size=samples_per_task, key=key)
    rollouts = [trajectory for group in groups for trajectory in group]
    own = iter(await env_nats(engine, rollouts))
    results = tuple(_task_result(group, list(islice(own, len(group)))) for group in groups)
    known = _recorded_results(recorded, await env_nats(engine, recorded))
    return Evaluation(
        step=step,
        samples_per_task=samples_per_task,
        pass_at_1=_mean_pass(results, 1),
        pass_at_k=_mean_pass(results, samples_per_task),
        reward=ratio_interval([(r.reward_sum, r.scored) for r in results]),
        env_ce_recorded=ratio_interval([(r.env_nats, r.env_tokens) for r in known]),
        env_ce_own=ratio_interval([(r.env_nats, r.env_tokens) for r in results]),
        per_rollout=mean_stats(rollouts),
        stop_reasons=dict(Counter(t.stop_reason.value for t in rollouts)),
        no_reward=sum(t.reward is None for t in rollouts),
        seconds=time.monotonic() - started,
        tasks=results,
        recorded=known,
    ), groups


async def env_nats(engine: Engine, trajectories: Sequence[Trajectory]) -> list[tuple[float, int]]:
    """Return each trajectory's negative log-likelihood in nats, summed over ENV_OUTPUT tokens, and their number."""
    if not trajectories:
        return []
    totals = []
    for trajectory, logprobs in zip(trajectories, await engine.score(list(trajectories)), strict=True):
        output = [x for x, role in zip(logprobs, trajectory.roles, strict=True) if role is TokenRole.ENV_OUTPUT]
        totals.append((-sum(output), len(output)))
    return totals


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
        invalid_calls=sum(t.stats.get("invalid_calls", 0.0) for t in group),
    )


def _recorded_results(recorded: Sequence[Trajectory], nats: Sequence[tuple[float, int]]) -> tuple[RecordedResult, ...]:
    totals: dict[str, tuple[float, int]] = {}
    for trajectory, (n, count) in zip(recorded, nats, strict=True):
        before = totals.get(trajectory.task_id, (0.0, 0))
        totals[trajectory.task_id] = (before[0] + n, before[1] + count)
    return tuple(RecordedResult(task_id=t, env_nats=n, env_tokens=count) for t, (n, count) in totals.items())


def _mean_pass(results: Sequence[TaskResult], k: int) -> Interval | None:
    """Return the mean pass@k over the tasks with at least k scored rollouts."""
    return ratio_interval([(pass_at_k(r.scored, r.solved, k), 1.0) for r in results if r.scored >= k])
