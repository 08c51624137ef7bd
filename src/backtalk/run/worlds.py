"""The worlds that a run's tasks are played in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from backtalk.envs.base import Env, World, WorldReport
from backtalk.errors import ConfigError, InfrastructureError
from backtalk.rollout.groups import EnvFactory, fit_machine
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.config import TrainConfig
from backtalk.run.events import Notice, OnEvent, RolloutDone
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, Trajectory, TrajectoryGroup


class Worlds:
    """Every world that some tasks ask for, each made once.

    Raises:
        SandboxUnavailable, ConfigError: one of them cannot be had on this machine.
    """

    def __init__(self, tasks: Iterable[Task], config: TrainConfig) -> None:
        self._config = config
        self._worlds = {name: make_world(name, config) for name in sorted({task.world for task in tasks})}

    @property
    def reports(self) -> tuple[WorldReport, ...]:
        return tuple(world.report for world in self._worlds.values())

    def fit_machine(self, tell: OnEvent) -> RolloutLimits:
        """Return the limits of a rollout with as many at once as are asked for and this machine carries."""
        limits = self._config.rollout
        if limits.concurrency is not None and "terminal" not in self._worlds:
            return limits  # no sandbox of ours
        fitted, notice = fit_machine(limits, self._config.terminal.sandbox)
        if notice:
            tell(Notice(notice))
        return fitted

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        return self._worlds[task.world].open(task)

    async def close(self) -> None:
        for world in self._worlds.values():
            await world.close()


def make_world(name: str, config: TrainConfig) -> World:
    """The world of a task's ``world``: "terminal", "openenv:WHERE" or "awm:WHICH"."""
    kind, _, which = name.partition(":")
    options = next((source.options for source in config.tasks.sources if source.name == name), {})
    match kind:
        case "terminal":
            from backtalk.envs.terminal import TerminalWorld
            from backtalk.sandboxes import local_sandbox
            from backtalk.sandboxes.pool import PooledBackend

            backend = local_sandbox(config.sandbox, root=config.terminal.root)
            return TerminalWorld(PooledBackend(backend), config.terminal)  # no more at once than the machine carries
        case "openenv":
            from backtalk.envs.openenv import OpenEnvConfig, OpenEnvWorld
            from backtalk.settings import from_plain

            return OpenEnvWorld(which, from_plain(OpenEnvConfig, options, "tasks.source.options."))
        case "awm":
            from backtalk.envs.awm import AwmConfig, AwmWorld
            from backtalk.settings import from_plain

            return AwmWorld(which, from_plain(AwmConfig, options, "tasks.source.options."))
        case _:
            raise ConfigError(f"no world is called {name!r}; there are terminal, openenv:WHERE and awm:WHICH")


def counted(open_env: EnvFactory, phase: str, step: int, total: int, tell: OnEvent) -> EnvFactory:
    """``open_env`` that tells of every environment it closes."""
    done = 0

    @asynccontextmanager
    async def opened(task: Task) -> AsyncIterator[Env]:
        nonlocal done
        try:
            async with open_env(task) as env:
                yield env
        finally:
            done += 1
            tell(RolloutDone(phase, step, done, total))

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
