"""Open the world of each task source of a run, and play every task in the world that brought it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from backtalk.envs.base import Env, World, WorldReport
from backtalk.envs.terminal import TerminalWorld
from backtalk.errors import ConfigError, InfrastructureError
from backtalk.rollout.groups import EnvFactory, fit_concurrency
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.config import TaskSource, TrainConfig
from backtalk.run.events import Notice, OnEvent, RolloutDone
from backtalk.sandboxes import SandboxBackend
from backtalk.settings import from_plain, import_object
from backtalk.tasks.load import check_unique_ids, load_tasks
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import StopReason, Trajectory, TrajectoryGroup

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # package.module:World


class Worlds:
    """The worlds of a run's task sources, each opened once. Terminals share one pool of sandboxes.

    ``on_notice`` is called with a line for each task that is left out.

    Raises:
        SandboxUnavailable, ConfigError: a world cannot be had on this machine.
    """

    def __init__(self, config: TrainConfig, on_notice: Callable[[str], None] | None = None) -> None:
        self._config, self._on_notice = config, on_notice
        self._worlds = [(source, self._open_world(source)) for source in config.tasks.sources]
        self._world_of: dict[str, World] = {}  # by task id

    @property
    def reports(self) -> tuple[WorldReport, ...]:
        return tuple(dict.fromkeys(world.report for _, world in self._worlds))

    def tasks(self, split: Split, count: int, seed: int) -> list[list[Task]]:
        """Return at most ``count`` tasks of a split for each source, in the order of the settings.

        Raises:
            TaskError: two tasks share an id, or one cannot be read.
        """
        loaded = [(source, world, self._tasks_of(source, world, split, count, seed)) for source, world in self._worlds]
        check_unique_ids((task, source.name) for source, _, tasks in loaded for task in tasks)
        self._world_of |= {task.id: world for _, world, tasks in loaded for task in tasks}
        return [tasks for _, _, tasks in loaded]

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """Open an environment for a task that ``tasks`` has returned."""
        return self._world_of[task.id].open(task)

    def fit_concurrency(self, on_event: OnEvent) -> RolloutLimits:
        """Return the limits of a rollout with as many at once as are asked for and this machine carries."""
        limits = self._config.rollout
        if limits.concurrency is not None and not any(isinstance(world, TerminalWorld) for _, world in self._worlds):
            return limits  # no sandbox of ours
        return fit_concurrency(limits, self._config.terminal.sandbox, lambda text: on_event(Notice(text)))

    async def close(self) -> None:
        """Close every world."""
        for _, world in self._worlds:
            await world.close()

    def _tasks_of(self, source: TaskSource, world: World, split: Split, count: int, seed: int) -> list[Task]:
        tasks = world.tasks(split, count, seed)
        if source.world_model_only:
            return [replace(task, metadata={**task.metadata, "world_model_only": True}) for task in tasks]
        return list(tasks)

    def _open_world(self, source: TaskSource) -> World:
        """Return the world of one source; what it needs is imported only here."""
        kind, _, which = source.name.partition(":")
        match kind:
            case "openenv":
                from backtalk.envs.openenv import OpenEnvConfig, OpenEnvWorld

                return OpenEnvWorld(which, from_plain(OpenEnvConfig, source.options, "tasks.source.options."))
            case "awm":
                from backtalk.envs.awm import AwmConfig, AwmWorld

                return AwmWorld(which, from_plain(AwmConfig, source.options, "tasks.source.options."))
            case _ if IMPORT_PATH.fullmatch(source.name) and kind != "hf":
                return _own_world(source)
            case _:
                load = partial(
                    load_tasks,
                    source.name,
                    levels=source.levels or (),
                    host_packages=source.host_packages,
                    world_model_only=source.world_model_only,
                    on_skip=self._on_notice,
                )
                return TerminalWorld(
                    self._sandboxes,
                    self._config.terminal,
                    lambda split, count, seed: load(split=split, count=count, seed=seed),
                )

    @cached_property
    def _sandboxes(self) -> SandboxBackend:
        """Return the sandboxes of all terminals: no more at a time than the machine carries."""
        from backtalk.sandboxes import local_sandbox
        from backtalk.sandboxes.pool import PooledBackend

        return PooledBackend(local_sandbox(self._config.sandbox, root=self._config.terminal.root))


def _own_world(source: TaskSource) -> World:
    """Return a world that a user wrote, named by its import path and made with the source's options."""
    kind: Any = import_object(source.name, "tasks.source")
    if not isinstance(kind, type) or not all(hasattr(kind, name) for name in ("tasks", "open", "close", "report")):
        raise ConfigError(
            f"tasks.source={source.name!r} names {kind!r}, which is no world; name a class with tasks, open, close "
            "and report, for example a subclass of backtalk.envs.python.PythonWorld"
        )
    make: Callable[..., Any] = kind
    try:
        return make(**source.options)
    except TypeError as error:
        raise ConfigError(
            f"tasks.source={source.name!r} cannot be made with options {dict(source.options)}: {error}; give the "
            "arguments that the class takes"
        ) from error


def counted(open_env: EnvFactory, phase: str, step: int, total: int, on_event: OnEvent) -> EnvFactory:
    """Return ``open_env`` with a ``RolloutDone`` event for every environment that is closed."""
    done = 0

    @asynccontextmanager
    async def opened(task: Task) -> AsyncIterator[Env]:
        nonlocal done
        try:
            async with open_env(task) as env:
                yield env
        finally:
            done += 1
            on_event(RolloutDone(phase, step, done, total))

    return opened


def came_through(trajectory: Trajectory, *, observations_teach: bool = True) -> bool:
    """Tell whether a rollout left anything to learn from or to measure.

    A failed one did not. One that ended at its deadline has no reward: it came through if the policy acted, and what
    the environment answered is learned from.
    """
    if trajectory.stop_reason is StopReason.DEADLINE:
        return observations_teach and trajectory.num_turns > 0
    return trajectory.failure is None


def check_rollouts(groups: Sequence[TrajectoryGroup], what: str, *, observations_teach: bool = True) -> None:
    """Raise InfrastructureError where no rollout came through: then world, machine or settings are broken, not a task.

    ``what`` names these rollouts, as in "step 3".
    """
    rollouts = [trajectory for group in groups for trajectory in group]
    if not rollouts or any(came_through(one, observations_teach=observations_teach) for one in rollouts):
        return
    failures = [one.failure for one in rollouts if one.failure is not None]
    told, advice = [], "`backtalk doctor` says what this machine lacks. Continue with --resume once it works"
    if late := len(rollouts) - len(failures):
        acted = any(one.num_turns for one in rollouts if one.failure is None)
        why = "and world_model_coeff=0 learns nothing from those" if acted else "before the policy sampled an action"
        told.append(f"{_part(late, rollouts)} rollouts of {what} ended at their deadline, {why}")
        advice = f"raise rollout.rollout_timeout_s, or lower rollout.concurrency or rollout.max_turns; {advice}"
    if failures:
        first = failures[0]
        told.append(
            f"{_part(len(failures), rollouts)} rollouts of {what} failed, the first at {first.phase} with "
            f"{first.error}: {first.message}"
        )
    raise InfrastructureError(f"{'; '.join(told)}; {advice}")


def _part(count: int, rollouts: Sequence[Trajectory]) -> str:
    return f"all {count}" if count == len(rollouts) else f"{count} of {len(rollouts)}"
