"""Many attempts at once, each tried again where its world broke before it had begun.

A rollout is one attempt at one task; its record is a trajectory. docs/rollouts.md states the rules.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

from backtalk.errors import ConfigError, merge_repeats
from backtalk.language.renderer import Renderer
from backtalk.rollout.admission import Admission
from backtalk.rollout.limits import Deadline, RolloutLimits
from backtalk.rollout.rollout import EnvFactory, attempt
from backtalk.rollout.sampler import Sampler
from backtalk.sandboxes.base import SandboxLimits
from backtalk.tasks.task import Task
from backtalk.trajectory import Trajectory, TrajectoryGroup

BACKOFF_S = 1.0  # before the first retry, at most; twice as long before each further one
MOST_ARE = 0.9  # share of a step's rollouts that has to be done before the others are hurried
ELSEWHERE = 64  # rollouts at once on a system that cannot be asked


async def run_rollout(
    task: Task,
    open_env: EnvFactory,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    sample_index: int,
    key: str,
    deadline: Deadline | None = None,
    admission: Admission | None = None,
) -> Trajectory:
    """One attempt, in a fresh world again where one broke before the policy had said anything.

    Time for all of it, set-up and waiting included, is the smaller of the limits' and the task's.
    """
    version = sampler.policy_version
    deadline, admission = deadline or Deadline(time_for(task, limits)), admission or Admission()
    record = await attempt(task, open_env, sampler, renderer, limits, deadline, admission, key=key)
    for retry in range(limits.max_retries):
        wait_s = backoff_s(key, retry)
        if not record.may_be_retried or wait_s >= deadline.left_s:
            break
        await asyncio.sleep(wait_s)
        record = await attempt(task, open_env, sampler, renderer, limits, deadline, admission, key=key)
        record.stats["retries"] = retry + 1.0
    return record.trajectory(task, sample_index, version)


def time_for(task: Task, limits: RolloutLimits) -> float:
    """Seconds from opening the world to the last turn."""
    return min(limits.rollout_timeout_s, task.agent_timeout_s)


def backoff_s(key: str, retry: int) -> float:
    """How long to wait before a retry, counted from 0: doubling, and the key shortens it by up to half.

    So that a run can be repeated, and rollouts whose worlds broke together do not come back together.
    """
    digest = hashlib.sha256(f"{key}/{retry}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return BACKOFF_S * 2**retry * (1 - share / 2)


def fit_machine(limits: RolloutLimits, sandbox: SandboxLimits | None = None) -> tuple[RolloutLimits, str | None]:
    """Return the limits with as many rollouts at once as this machine holds sandboxes, and a line where that is fewer.

    ``limits.concurrency`` is an upper bound; None is none.
    """
    wanted = limits.concurrency
    if sys.platform != "linux":
        return replace(limits, concurrency=wanted or ELSEWHERE), None
    from backtalk.sandboxes.machine.capacity import capacity

    found = capacity(sandbox or SandboxLimits())
    if wanted is None or wanted <= found.sandboxes:
        return replace(limits, concurrency=wanted or found.sandboxes), None
    return replace(limits, concurrency=found.sandboxes), (
        f"rollout.concurrency={wanted} is lowered to {found.sandboxes}, as many sandboxes as this machine carries "
        f"with {found.bound}; every rollout runs, fewer of them at once"
    )


class Stragglers:
    """Ends the slowest rollouts of a step, so that they do not hold it; off where ``factor`` is None.

    When nine in ten are done, each of the others ends ``factor`` times their median duration after its beginning.
    Its deadline is then that much earlier, with the same consequences.
    """

    def __init__(self, rollouts: int, factor: float | None) -> None:
        self._factor, self._most = factor, math.ceil(MOST_ARE * rollouts)
        self._running: set[Deadline] = set()
        self._durations_s: list[float] = []

    @contextmanager
    def watch(self, deadline: Deadline) -> Iterator[None]:
        """For as long as the rollout of this deadline runs."""
        self._running.add(deadline)
        self._hurry()
        try:
            yield
        finally:
            self._running.remove(deadline)
            self._durations_s.append(deadline.elapsed_s)
            self._hurry()

    def _hurry(self) -> None:
        if self._factor is not None and len(self._durations_s) >= self._most:
            allowed_s = self._factor * median(self._durations_s)
            for deadline in self._running:
                deadline.bring_forward(allowed_s)


async def run_group(
    task: Task,
    open_env: EnvFactory,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    group_size: int,
    key: str,
) -> TrajectoryGroup:
    """``group_size`` attempts at one task, at once."""
    return (await run_groups([task], open_env, sampler, renderer, limits, group_size=group_size, key=key))[0]


async def run_groups(
    tasks: Sequence[Task],
    open_env: EnvFactory,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    group_size: int,
    key: str,
) -> list[TrajectoryGroup]:
    """A group for each task, in order; at most ``limits.concurrency`` rollouts at once, over all of them.

    None is as many as this machine holds sandboxes of the usual limits.

    A failed attempt touches no other. A bug, or Ctrl-C, ends them all, closes their worlds and is raised; several bugs
    at the same moment are raised as an ExceptionGroup.
    """
    if group_size < 1:
        raise ConfigError(f"group_size={group_size} makes no attempt; use group_size >= 1")
    num_concurrent = limits.concurrency or fit_machine(limits)[0].concurrency or 1
    turns, admission = asyncio.Semaphore(num_concurrent), Admission()
    stragglers = Stragglers(len(tasks) * group_size, limits.straggler_factor)

    async def rollout(task: Task, index: int) -> Trajectory:
        async with turns:
            name, deadline = f"{key}/{task.id}/{index}", Deadline(time_for(task, limits))
            play = partial(run_rollout, task, open_env, sampler, renderer, limits, sample_index=index, key=name)
            with stragglers.watch(deadline):
                return await play(deadline=deadline, admission=admission)

    try:
        async with asyncio.TaskGroup() as attempts:
            groups = [[attempts.create_task(rollout(task, i)) for i in range(group_size)] for task in tasks]
    except ExceptionGroup as errors:
        raise merge_repeats(errors) from None
    return [
        TrajectoryGroup(task.id, tuple(done.result() for done in group))
        for task, group in zip(tasks, groups, strict=True)
    ]
