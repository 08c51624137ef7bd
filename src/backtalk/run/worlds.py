"""The worlds that a run's tasks are played in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from backtalk.envs.base import Env, World, WorldReport
from backtalk.errors import ConfigError
from backtalk.rollout.groups import EnvFactory
from backtalk.run.config import TrainConfig
from backtalk.run.events import OnEvent, RolloutDone
from backtalk.tasks.task import Task


class Worlds:
    """Every world that some tasks ask for, each made once.

    Raises:
        SandboxUnavailable, ConfigError: one of them cannot be had on this machine.
    """

    def __init__(self, tasks: Iterable[Task], config: TrainConfig) -> None:
        self._worlds = {name: make_world(name, config) for name in sorted({task.world for task in tasks})}

    @property
    def reports(self) -> tuple[WorldReport, ...]:
        return tuple(world.report for world in self._worlds.values())

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
            from backtalk.settings import build

            return OpenEnvWorld(which, build(OpenEnvConfig, options, "tasks.source.options."))
        case "awm":
            from backtalk.envs.awm import AwmConfig, AwmWorld
            from backtalk.settings import build

            return AwmWorld(which, build(AwmConfig, options, "tasks.source.options."))
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
