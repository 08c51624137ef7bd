"""The world of a task source "awm:WHICH": scenarios of the Agent World Model, with their tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.env import AwmEnv
from backtalk.envs.awm.library import GENERATED, open_library
from backtalk.envs.awm.session import Session
from backtalk.envs.awm.shop import SEEDS_FROM, TASK_COUNT, shop_contents
from backtalk.envs.base import WorldReport
from backtalk.errors import ConfigError
from backtalk.messages import ToolSpec
from backtalk.tasks.load import draw_tasks
from backtalk.tasks.task import Split, Task


def awm_tasks(which: str, headers: Mapping[str, str] = MappingProxyType({})) -> list[Task]:
    """Return every task of "shop", "shop-ten", "tickets", "FOLDER[#SCENARIO]" or "URL[#SCENARIO]".

    A server is asked with ``headers``.

    Raises:
        ConfigError: there is no such place, or no such scenario in it.
        DataError: the files cannot be read.
        InfrastructureError: the server does not answer.
    """
    where, scenario = _parts(which)
    if where == GENERATED:
        return [_generated(seed) for seed in range(SEEDS_FROM, SEEDS_FROM + TASK_COUNT)]
    if is_url(where):
        from backtalk.envs.awm.remote import list_remote

        listed = list_remote(where, headers)
    else:
        listed = open_library(where).listed()
    names = [row["name"] for row in listed]
    if scenario is not None and scenario not in names:
        raise ConfigError(f"{where} has no scenario {scenario!r}; it has {', '.join(names[:20])}")
    return [
        _task(f"{row['name']}/{idx}", text, scenario=row["name"], task_idx=idx, description=row["description"])
        for row in listed
        if scenario in (None, row["name"])
        for idx, text in enumerate(row["tasks"])
    ]


class AwmWorld:
    """Episodes of the scenarios of one source (a ``World``). A program is executed when it is first played.

    The programs of "awm:shop", "awm:shop-ten" and "awm:tickets" run in this process, a folder's in sandboxes.

    Raises:
        ConfigError: there is no such source, or what it needs is not installed.
        SandboxUnavailable: a folder's programs cannot be isolated on this machine.
    """

    def __init__(self, which: str, config: AwmConfig) -> None:
        self._which, self._config = which, config
        self._where, _ = _parts(which)
        self._remote = is_url(self._where)
        self._server: Any = None
        self._isolation: Any = None
        if config.verifier == "sql" and not self._remote:
            raise ConfigError(
                "verifier=sql leaves the verdict to a language model that a server asks; play on one (awm:http://...), "
                "or use verifier=code"
            )
        if self._remote:
            from backtalk.envs.awm.remote import remote_world

            self._server = remote_world(self._where, config)
            return
        self._library = open_library(self._where)
        if self._library.shipped:
            self._library.program(next(iter(self._library.scenarios)))  # says at once what is not installed
        else:
            from backtalk.envs.awm.isolation import Isolation

            self._isolation = Isolation(self._where, self._library.scenarios, config)

    @property
    def report(self) -> WorldReport:
        if self._remote:
            return WorldReport(f"Agent World Model on {self._where}")
        if self._isolation is not None:
            backend = self._isolation.backend.report
            return WorldReport(f"Agent World Model, {self._where}, in {backend.name}", backend.warnings)
        return WorldReport(f"Agent World Model, {self._where}")

    def tools(self, scenario: str) -> tuple[ToolSpec, ...]:
        """Return what an agent is offered in a scenario that ships with Backtalk, beside ``done``."""
        return self._library.program(scenario).tools

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        return draw_tasks(awm_tasks(self._which, self._config.headers), split, count, seed)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[AwmEnv]:
        session = self._session(task)
        try:
            yield AwmEnv(task, session, self._config)
        finally:
            await session.close()

    async def close(self) -> None:
        for held in (self._isolation, self._server):
            if held is not None:
                await held.close()

    def _session(self, task: Task) -> Session:
        chosen = {name: task.metadata[name] for name in ("task_idx", "seed") if name in task.metadata}
        name, timeout_s = task.metadata["scenario"], self._config.call_timeout_s
        if self._remote:
            from backtalk.envs.awm.remote import RemoteSession

            return RemoteSession(self._server, {**self._config.reset, "scenario": name, **chosen})
        if self._isolation is not None:
            return self._isolation.session(name, chosen["task_idx"])
        return self._library.session(name, **chosen, call_timeout_s=timeout_s)


def is_url(where: str) -> bool:
    return where.startswith(("http://", "https://", "ws://", "wss://"))


@cache
def _generated(seed: int) -> Task:
    contents, task = shop_contents(seed)
    description = _description(GENERATED)
    about = {"scenario": GENERATED, "seed": seed, "kind": task.kind, "description": description}
    return _task(f"shop-{seed}", contents.task, **about)


@cache
def _description(where: str) -> str:
    return open_library(where).scenarios[where].description


def _task(name: str, text: str, **about: object) -> Task:
    return Task(id=name, instruction=text, metadata=about)


def _parts(which: str) -> tuple[str, str | None]:
    where, _, scenario = which.partition("#")
    return where, scenario or None
