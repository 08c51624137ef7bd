"""Reads the file format of Agent World Model scenarios: seven JSONL files, each row about one scenario.

Source: AgentWorldModel-1K (arXiv 2602.10090) and the environment of OpenEnv that serves it. A scenario is a FastAPI
program over SQLite, the schema and first rows of its database, tasks, and for each task verifiers: code that compares
the database before and after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backtalk.errors import DataError

SCENARIOS, TASKS, SCHEMAS, SAMPLES = "gen_scenario.jsonl", "gen_tasks.jsonl", "gen_db.jsonl", "gen_sample.jsonl"
PROGRAMS, SQL_VERIFIERS, CODE_VERIFIERS = "gen_envs.jsonl", "gen_verifier.jsonl", "gen_verifier.pure_code.jsonl"
FILES = (SCENARIOS, TASKS, SCHEMAS, SAMPLES, PROGRAMS, SQL_VERIFIERS, CODE_VERIFIERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioTask:
    """One task in a scenario, with the rows that its database starts with."""

    instruction: str
    task_idx: int
    inserts: tuple[str, ...] = field(repr=False)  # SQL, in order
    verifiers: Mapping[str, str] = field(default_factory=dict, repr=False)  # Python source by mode: code, sql


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A program, its database, and tasks in it."""

    name: str
    description: str
    program: str = field(repr=False)  # Python source of a FastAPI app called ``app``
    schema: tuple[str, ...] = field(repr=False)  # SQL, in order
    inserts: tuple[str, ...] = field(repr=False)
    tasks: tuple[str, ...] = field(repr=False)
    verifiers: Mapping[str, Mapping[int, str]] = field(default_factory=dict, repr=False)  # by mode and task_idx

    def task(self, task_idx: int) -> ScenarioTask:
        """Return one of the tasks in the files; raises DataError where there is none of that number."""
        if not 0 <= task_idx < len(self.tasks):
            raise DataError(f"{self.name} has tasks 0 to {len(self.tasks) - 1}, got task_idx={task_idx}")
        verifiers = {mode: codes[task_idx] for mode, codes in self.verifiers.items() if task_idx in codes}
        instruction = self.tasks[task_idx]
        return ScenarioTask(instruction=instruction, task_idx=task_idx, inserts=self.inserts, verifiers=verifiers)


def scenario_key(name: str) -> str:
    """Return a name as scenarios are looked up: lower case, other characters than letters and digits as one "_"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def read_scenarios(folder: Path) -> dict[str, Scenario]:
    """Read every scenario that has a program, by its key. The description and the verifiers may be missing.

    Raises:
        DataError: a file is missing or no JSON lines, or a program has no database or no tasks.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise DataError(f"{folder} is no Agent World Model dataset: it has no {', '.join(missing)}")
    descriptions = {
        scenario_key(_get(row, "name", at)): row.get("description", "") for at, row in _rows(folder, SCENARIOS)
    }
    tasks = _by_scenario(folder, TASKS, "tasks")
    schemas, samples = _by_scenario(folder, SCHEMAS, "db_schema"), _by_scenario(folder, SAMPLES, "sample_data")
    verifiers = {"code": _verifiers(folder, CODE_VERIFIERS), "sql": _verifiers(folder, SQL_VERIFIERS)}
    scenarios = {}
    for key, program in _by_scenario(folder, PROGRAMS, "full_code").items():
        for name, found in ((TASKS, tasks), (SCHEMAS, schemas), (SAMPLES, samples)):
            if key not in found:
                raise DataError(f"{folder / PROGRAMS} has a program for {key!r}, and {name} says nothing of it")
        scenarios[key] = Scenario(
            name=key,
            description=descriptions.get(key, ""),
            program=program,
            schema=tuple(_schema(schemas[key], f"{key} in {SCHEMAS}")),
            inserts=tuple(_inserts(samples[key], f"{key} in {SAMPLES}")),
            tasks=tuple(tasks[key]),
            verifiers={mode: codes[key] for mode, codes in verifiers.items() if key in codes},
        )
    return scenarios


def _rows(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row ("FILE:LINE") and the row."""
    try:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / name} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at = f"{folder / name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{at} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{at} is not a JSON object")
        yield at, row


def _get(row: Mapping[str, Any], key: str, at: str) -> Any:
    if key not in row:
        raise DataError(f"{at} has no {key!r}, only {sorted(row)}")
    return row[key]


def _by_scenario(folder: Path, name: str, key: str) -> dict[str, Any]:
    return {scenario_key(_get(row, "scenario", at)): _get(row, key, at) for at, row in _rows(folder, name)}


def _verifiers(folder: Path, name: str) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for at, row in _rows(folder, name):
        code = _get(row, "verification", at).get("code")
        if isinstance(code, str) and code.strip():  # some rows of the published files hold none
            found.setdefault(scenario_key(_get(row, "scenario", at)), {})[int(_get(row, "task_idx", at))] = code
    return found


def _schema(schema: Any, at: str) -> Iterator[str]:
    for table in _get(schema, "tables", at):
        statements = [table.get("ddl") or "", *(table.get("indexes") or ())]
        yield from filter(None, map(str.strip, statements))


def _inserts(sample: Any, at: str) -> Iterator[str]:
    for item in _get(sample, "tables", at) if isinstance(sample, dict) else sample:
        statements = [item] if isinstance(item, str) else item.get("insert_statements") or ()
        yield from filter(None, map(str.strip, statements))
