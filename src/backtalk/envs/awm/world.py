"""The world of a task source "awm:WHICH": scenarios of the Agent World Model, with their tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.env import AwmEnv
from backtalk.envs.awm.files import Scenario, read_scenarios
from backtalk.envs.awm.program import Program
from backtalk.envs.awm.session import LocalSession
from backtalk.envs.awm.shop import FIRST_SEED, TASK_COUNT, generate_task
from backtalk.envs.base import WorldReport
from backtalk.errors import ConfigError, DataError, TaskError
from backtalk.tasks.load import draw_tasks
from backtalk.tasks.task import Split, Task

if TYPE_CHECKING:
    from backtalk.envs.awm.isolation import IsolatedScenarios
    from backtalk.envs.awm.remote import RemoteScenarios

GENERATED = "shop"  # the scenario whose tasks are also generated from seeds
SHIPPED = {"shop": "shop", "shop-ten": "shop", "tickets": "tickets"}  # folder in assets/awm by name of the source


class LocalScenarios:
    """Scenarios played in this process. A program is executed when it is first needed.

    ``shipped`` marks scenarios that were read from this package's own files: those are trusted to run in the trainer,
    and "shop" among them can be filled from a seed. No name in a file decides it.
    """

    def __init__(
        self, scenarios: Mapping[str, Scenario], *, shipped: bool = False, call_timeout_s: float = 30.0
    ) -> None:
        self.scenarios, self.shipped, self._timeout_s = scenarios, shipped, call_timeout_s
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        """Return a scenario's program; raises DataError where there is none, and what ``Program`` raises."""
        if name not in self.scenarios:
            raise DataError(f"there is no scenario {name!r}; there are {', '.join(list(self.scenarios)[:20])}")
        if name not in self._programs:
            self._programs[name] = Program(self.scenarios[name])
        return self._programs[name]

    def session(self, scenario: str, *, task_idx: int | None = None, seed: int | None = None) -> LocalSession:
        """Return a rollout of a task, given by its number or by a seed, that is not started yet."""
        program = self.program(scenario)
        if task_idx is not None:
            task = program.scenario.task(task_idx)
        elif seed is not None and self.shipped and scenario == GENERATED:
            task = generate_task(seed)[0]
            verifiers = {**program.scenario.task(task.task_idx).verifiers, **task.verifiers}
            task = replace(task, verifiers=verifiers)
        else:
            raise DataError(f"a rollout of {scenario} needs a task_idx, or for the shop that ships here a seed")
        return LocalSession(program, task, call_timeout_s=self._timeout_s)

    def listed(self) -> list[dict[str, Any]]:
        """Return name, description and tasks of each scenario, as the published environment lists them."""
        return [
            {"name": name, "description": s.description, "num_tasks": len(s.tasks), "tasks": list(s.tasks)}
            for name, s in self.scenarios.items()
        ]

    async def close(self) -> None:
        """Do nothing: sessions free their own databases."""


def open_scenarios(location: str, call_timeout_s: float = 30.0) -> LocalScenarios:
    """Read the scenarios of a folder, or of a source that ships with the package.

    Raises:
        ConfigError: there is no such folder.
        DataError: its files cannot be read.
        TaskError: it holds no scenario.
    """
    if location in SHIPPED:
        return LocalScenarios(_read_shipped(SHIPPED[location]), shipped=True, call_timeout_s=call_timeout_s)
    folder = Path(location).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"awm:{location} names no scenarios; use {', '.join(f'awm:{name}' for name in SHIPPED)}, the folder of a "
            "dataset (gen_scenario.jsonl and six more), or the address of a server such as awm:http://127.0.0.1:8000"
        )
    if not (found := read_scenarios(folder)):
        raise TaskError(f"{folder} holds no scenario with a program")
    return LocalScenarios(found, call_timeout_s=call_timeout_s)


def awm_tasks(which: str, headers: Mapping[str, str] = MappingProxyType({})) -> list[Task]:
    """Return every task of "shop", "shop-ten", "tickets", "FOLDER[#SCENARIO]" or "URL[#SCENARIO]".

    ``headers`` are sent to a server.

    Raises:
        ConfigError: there is no such source, or no such scenario in it.
        DataError: the files cannot be read.
        InfrastructureError: the server does not answer.
    """
    location, _, wanted = which.partition("#")
    if location == GENERATED:
        return [_generated_task(seed) for seed in range(FIRST_SEED, FIRST_SEED + TASK_COUNT)]
    if _is_url(location):
        from backtalk.envs.awm.remote import list_scenarios

        listed = list_scenarios(location, headers)
    else:
        listed = open_scenarios(location).listed()
    names = [row["name"] for row in listed]
    if wanted and wanted not in names:
        raise ConfigError(f"{location} has no scenario {wanted!r}; it has {', '.join(names[:20])}")
    return [
        Task(
            id=f"{row['name']}/{task_idx}",
            instruction=text,
            metadata={"scenario": row["name"], "task_idx": task_idx, "description": row["description"]},
        )
        for row in listed
        if wanted in ("", row["name"])
        for task_idx, text in enumerate(row["tasks"])
    ]


class AwmWorld:
    """The environments of one source's tasks (a ``World``). A program is executed when it is first played.

    The programs of "awm:shop", "awm:shop-ten" and "awm:tickets" run in this process, a folder's in sandboxes.

    Raises:
        ConfigError: there is no such source, or what it needs is not installed.
        SandboxUnavailable: a folder's programs cannot be isolated on this machine.
    """

    def __init__(self, which: str, config: AwmConfig) -> None:
        self._which, self._config = which, config
        location = which.partition("#")[0]
        self._scenarios: LocalScenarios | IsolatedScenarios | RemoteScenarios
        if _is_url(location):
            from backtalk.envs.awm.remote import RemoteScenarios

            self._scenarios = RemoteScenarios(location, config)
            self.report = WorldReport(f"Agent World Model on {location}")
            return
        if config.verifier == "sql":
            raise ConfigError(
                "verifier=sql leaves the verdict to a language model that a server asks; play on one (awm:http://...), "
                "or use verifier=code"
            )
        self._scenarios = local = open_scenarios(location, config.call_timeout_s)
        self.report = WorldReport(f"Agent World Model, {location}")
        if local.shipped:
            local.program(next(iter(local.scenarios)))  # fails now if a package is missing, not at the first rollout
        else:
            from backtalk.envs.awm.isolation import IsolatedScenarios

            self._scenarios = isolated = IsolatedScenarios(location, local.scenarios, config)
            sandbox = isolated.backend.report
            self.report = WorldReport(f"{self.report.name}, in {sandbox.name}", sandbox.warnings)

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        return draw_tasks(awm_tasks(self._which, self._config.headers), split, count, seed)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[AwmEnv]:
        about = task.metadata
        session = self._scenarios.session(about["scenario"], task_idx=about.get("task_idx"), seed=about.get("seed"))
        try:
            yield AwmEnv(task, session, self._config)
        finally:
            await session.close()

    async def close(self) -> None:
        await self._scenarios.close()


def _is_url(location: str) -> bool:
    return location.startswith(("http://", "https://", "ws://", "wss://"))


@cache
def _read_shipped(name: str) -> dict[str, Scenario]:
    return read_scenarios(Path(str(resources.files("backtalk").joinpath("assets/awm", name))))


@cache
def _generated_task(seed: int) -> Task:
    task, plan = generate_task(seed)
    description = open_scenarios(GENERATED).scenarios[GENERATED].description
    about = {"scenario": GENERATED, "seed": seed, "kind": plan.kind, "description": description}
    return Task(id=f"shop-{seed}", instruction=task.instruction, metadata=about)
