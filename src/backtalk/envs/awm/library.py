"""Finds the scenarios of a source, and plays those that ship with Backtalk in this process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from backtalk.envs.awm.files import Contents, Scenario, read_scenarios
from backtalk.envs.awm.program import Program
from backtalk.envs.awm.session import LocalSession
from backtalk.envs.awm.shop import shop_contents
from backtalk.errors import ConfigError, DataError, TaskError

GENERATED = "shop"  # filled from seeds too; the others are the files as they are
SHIPPED = {"shop": "shop", "shop-ten": "shop", "tickets": "tickets"}  # names, and folders of assets/awm


class Library:
    """Scenarios by name. A program is executed in this process when it is first asked for.

    ``shipped`` says that they were read from this package's own files: they may be executed in the trainer, and a seed
    can fill the shop among them. No name in a file decides it.
    """

    def __init__(self, scenarios: Mapping[str, Scenario], *, shipped: bool = False) -> None:
        self.scenarios, self.shipped = scenarios, shipped
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        """Raises DataError where there is no such scenario, and what ``Program`` raises."""
        if name not in self.scenarios:
            raise DataError(f"there is no scenario {name!r}; there are {', '.join(list(self.scenarios)[:20])}")
        if name not in self._programs:
            self._programs[name] = Program(self.scenarios[name])
        return self._programs[name]

    def session(
        self, name: str, *, task_idx: int | None = None, seed: int | None = None, call_timeout_s: float = 30.0
    ) -> LocalSession:
        """An episode of a task, by its number or by a seed. Raises DataError where there is none."""
        program = self.program(name)
        return LocalSession(program, self._contents(program.scenario, task_idx, seed), call_timeout_s=call_timeout_s)

    def _contents(self, scenario: Scenario, task_idx: int | None, seed: int | None) -> Contents:
        if task_idx is not None:
            return scenario.contents(task_idx)
        if seed is not None and self.shipped and scenario.name == GENERATED:
            return shop_contents(seed)[0]
        raise DataError(f"an episode of {scenario.name} needs a task_idx, or for the shop that ships here a seed")

    def listed(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "description": each.description, "num_tasks": len(each.tasks), "tasks": list(each.tasks)}
            for name, each in self.scenarios.items()
        ]


def open_library(where: str) -> Library:
    """The scenarios of a folder, or of one that ships with the package.

    Raises:
        ConfigError: there is no such folder.
        DataError: its files cannot be read.
        TaskError: it holds no scenario.
    """
    if where in SHIPPED:
        return Library(_shipped(SHIPPED[where]), shipped=True)
    folder = Path(where).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"awm:{where} names no scenarios; use {', '.join(f'awm:{name}' for name in SHIPPED)}, the folder of a "
            "dataset (gen_scenario.jsonl and six more), or the address of a server such as awm:http://127.0.0.1:8000"
        )
    if not (found := read_scenarios(folder)):
        raise TaskError(f"{folder} holds no scenario with a program")
    return Library(found)


@cache
def _shipped(name: str) -> dict[str, Scenario]:
    return read_scenarios(Path(str(resources.files("backtalk").joinpath("assets/awm", name))))
