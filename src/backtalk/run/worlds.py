"""Open the world of each task source of a run, and open every task in the world that brought it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from backtalk.envs.base import Env, World, WorldReport
from backtalk.envs.terminal import LoadTasks, TerminalWorld
from backtalk.errors import ConfigError
from backtalk.rollout.groups import fit_concurrency
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.config import TaskSource, TrainConfig
from backtalk.sandboxes import SandboxBackend, local_sandbox
from backtalk.sandboxes.images.open import open_root
from backtalk.sandboxes.pool import PooledBackend
from backtalk.settings import import_object
from backtalk.tasks.load import check_unique_ids, draw_tasks, load_tasks, read_tasks
from backtalk.tasks.task import Split, Task

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # package.module:World

OnNotice = Callable[[str], None]


@asynccontextmanager
async def open_worlds(config: TrainConfig, on_notice: OnNotice = lambda text: None) -> AsyncIterator[Worlds]:
    """Open the world of each task source; all are closed when the context is left.

    Terminals share one pool of sandboxes. ``on_notice`` is called with a line for each task that is left out.

    Raises:
        SandboxUnavailable, ConfigError: a world cannot be had on this machine.
    """
    sandboxes = cache(lambda: open_sandboxes(config))
    async with AsyncExitStack() as stack:
        opened: list[World] = []
        for source in config.tasks.sources:
            opened.append(_open_world(source, config, sandboxes, on_notice))
            stack.push_async_callback(opened[-1].close)
        yield Worlds(config, opened)


class Worlds:
    """The open worlds of a run, one for each task source, in the order of the settings."""

    def __init__(self, config: TrainConfig, opened: Sequence[World]) -> None:
        self._config, self._opened = config, opened
        self._world_of: dict[str, World] = {}  # by task id

    @property
    def reports(self) -> tuple[WorldReport, ...]:
        """Return the distinct reports of the worlds."""
        return tuple(dict.fromkeys(world.report for world in self._opened))

    def tasks(self, split: Split, count: int, seed: int) -> list[list[Task]]:
        """Return at most ``count`` tasks of a split for each source.

        Raises:
            TaskError: two tasks share an id, or one cannot be read.
        """
        sources, loaded = self._config.tasks.sources, []
        for source, world in zip(sources, self._opened, strict=True):
            tasks = list(world.tasks(split, count, seed))
            if source.world_model_only:
                tasks = [replace(task, metadata={**task.metadata, "world_model_only": True}) for task in tasks]
            loaded.append(tasks)
            self._world_of |= dict.fromkeys((task.id for task in tasks), world)
        check_unique_ids((task, source.name) for source, tasks in zip(sources, loaded, strict=True) for task in tasks)
        return loaded

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """Open an environment for a task that ``tasks`` has returned."""
        return self._world_of[task.id].open(task)

    def fit_concurrency(self, on_notice: OnNotice) -> RolloutLimits:
        """Return the limits of a rollout, with no more concurrent ones than this machine carries sandboxes."""
        limits = self._config.rollout
        if limits.concurrency is not None and not any(isinstance(world, TerminalWorld) for world in self._opened):
            return limits
        return fit_concurrency(limits, self._config.terminal.sandbox, on_notice)


def open_sandboxes(config: TrainConfig) -> SandboxBackend:
    """Return a pool of local sandboxes, of which no more are alive than the machine carries."""
    return PooledBackend(local_sandbox(config.sandbox, root=config.terminal.root))


def _open_world(
    source: TaskSource, config: TrainConfig, sandboxes: Callable[[], SandboxBackend], on_notice: OnNotice
) -> World:
    kind, _, address = source.name.partition(":")
    match kind:
        case "openenv":
            from backtalk.envs.openenv.env import OpenEnvWorld

            return OpenEnvWorld(address, source.env_config())
        case "awm":
            from backtalk.envs.awm.world import AwmWorld

            return AwmWorld(address, source.env_config())
        case _ if IMPORT_PATH.fullmatch(source.name) and kind != "hf":
            return _open_own_world(source)
        case _:
            return TerminalWorld(sandboxes(), config.terminal, _task_loader(source, config.terminal.root, on_notice))


def _task_loader(source: TaskSource, root: str | None, on_notice: OnNotice) -> LoadTasks:
    """Return the loader of a terminal's tasks; what is on disk is read once, whatever the number of splits.

    What they need is looked for in ``root``, the root file system of ``terminal.root``, where there is one.
    """
    if source.name == "triage":
        levels = source.levels or ()
        return lambda split, count, seed: load_tasks("triage", split=split, count=count, seed=seed, levels=levels)

    @cache
    def tasks() -> list[Task]:
        return read_tasks(
            source.name,
            host_packages=source.host_packages,
            world_model_only=source.world_model_only,
            on_skip=on_notice,
            on_refuse=source.on_refuse,
            root=open_root(root),
        )

    return lambda split, count, seed: draw_tasks(tasks(), split, count, seed)


def _open_own_world(source: TaskSource) -> World:
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
