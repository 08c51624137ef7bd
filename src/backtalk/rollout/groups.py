"""Run the rollouts of a step concurrently, in groups, and end its stragglers. docs/rollouts.md states the rules."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

from backtalk.errors import ConfigError, merge_repeats
from backtalk.language.renderer import Renderer
from backtalk.rollout.admission import Admission
from backtalk.rollout.limits import Deadline, RolloutLimits
from backtalk.rollout.rollout import EnvFactory, run_rollout
from backtalk.rollout.sampler import ContinuousSampler, Sampler
from backtalk.sandboxes.base import SandboxLimits
from backtalk.spans import on_track
from backtalk.tasks.task import Task
from backtalk.trajectory import Trajectory, TrajectoryGroup

STRAGGLER_SHARE = 0.9  # of a step's rollouts that has to be done before the others are stragglers
DEFAULT_CONCURRENCY = 64  # where the capacity of the machine cannot be measured


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
    """Run ``group_size`` rollouts of each task, ``limits.concurrency`` at a time; return their groups in order.

    A failed rollout touches no other. A bug, a lost sampler or Ctrl-C ends them all, closes their environments and is
    raised; several bugs at the same moment are raised as an ExceptionGroup.
    """
    if group_size < 1:
        raise ConfigError(f"group_size={group_size} runs no rollout; use group_size >= 1")
    continuous = isinstance(sampler, ContinuousSampler)
    if continuous:
        await sampler.prepare()  # in no rollout's own time
    num_concurrent = limits.concurrency or fit_concurrency(limits).concurrency or 1
    running, admission = asyncio.Semaphore(num_concurrent), Admission(waits=not continuous)
    stragglers = Stragglers(len(tasks) * group_size, limits.straggler_factor)

    async def run(task: Task, index: int, number: int) -> Trajectory:
        on_track(f"rollout {number:03d}")
        async with running:
            deadline = Deadline(limits.timeout_s(task))
            with stragglers.watch(deadline):
                return await run_rollout(
                    *(task, open_env, sampler, renderer, limits),
                    sample_index=index,
                    key=f"{key}/{task.id}/{index}",
                    deadline=deadline,
                    admission=admission,
                )

    try:
        async with asyncio.TaskGroup() as rollouts:
            groups = [
                [rollouts.create_task(run(task, i, number * group_size + i)) for i in range(group_size)]
                for number, task in enumerate(tasks)
            ]
    except ExceptionGroup as errors:
        raise merge_repeats(errors) from None
    return [
        TrajectoryGroup(task.id, tuple(done.result() for done in group))
        for task, group in zip(tasks, groups, strict=True)
    ]


def fit_concurrency(
    limits: RolloutLimits, sandbox: SandboxLimits | None = None, on_notice: Callable[[str], None] = lambda text: None
) -> RolloutLimits:
    """Return the limits with no more concurrent rollouts than this machine carries sandboxes of the limits given.

    ``on_notice`` is called with a line of text if ``limits.concurrency`` is lowered.
    """
    wanted = limits.concurrency
    if sys.platform != "linux":
        return replace(limits, concurrency=wanted or DEFAULT_CONCURRENCY)
    from backtalk.sandboxes.machine.capacity import capacity

    found = capacity(sandbox or SandboxLimits())
    if wanted is not None and wanted > found.sandboxes:
        on_notice(
            f"rollout.concurrency={wanted} is lowered to {found.sandboxes}, as many sandboxes as this machine carries "
            f"with {found.bound}; every rollout runs, fewer of them at once"
        )
    return replace(limits, concurrency=min(wanted or found.sandboxes, found.sandboxes))


class Stragglers:
    """Ends the slowest rollouts of a step, so that they do not hold it up; off if ``factor`` is None.

    Once nine in ten are done, each of the others ends ``factor`` times their median duration after its beginning, as
    at its deadline.
    """

    def __init__(self, num_rollouts: int, factor: float | None) -> None:
        self._factor, self._num_before = factor, math.ceil(STRAGGLER_SHARE * num_rollouts)
        self._running: set[Deadline] = set()
        self._durations_s: list[float] = []

    @contextmanager
    def watch(self, deadline: Deadline) -> Iterator[None]:
        """Bring the deadline forward if its rollout, which runs inside, becomes a straggler."""
        self._running.add(deadline)
        self._bring_forward()
        try:
            yield
        finally:
            self._running.remove(deadline)
            self._durations_s.append(deadline.elapsed_s)
            self._bring_forward()

    def _bring_forward(self) -> None:
        if self._factor is not None and len(self._durations_s) >= self._num_before:
            allowed_s = self._factor * median(self._durations_s)
            for deadline in self._running:
                deadline.bring_forward(allowed_s)
