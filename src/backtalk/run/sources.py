"""Tasks and the worlds they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from backtalk.errors import ConfigError, TaskError
from backtalk.tasks.task import Split, Task

__all__ = ["load_tasks", "read_tasks"]

WRITTEN = ("workbench",)  # datasets of task folders that come with the package


def load_tasks(
    source: str,
    *,
    split: Split,
    count: int,
    levels: Sequence[int] = (1, 2),
    seed: int = 0,
    host_packages: bool = False,
    world_model_only: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    may_be_empty: bool = False,
    on_skip: Callable[[str], None] | None = None,
) -> list[Task]:
    """``count`` tasks of one split: made from the seed ("triage"), or drawn by it from those that a source holds.

    A source that holds fewer gives what it holds, sorted by id. ``levels`` matter to triage only, and ``options`` are
    those of an "openenv:WHERE" or "awm:WHICH"; the others, and what else a source can be, are those of ``read_tasks``.

    Raises:
        ConfigError: there is no such source.
        TaskError: a task cannot run, two have one id, or the split is empty, unless it ``may_be_empty``.
    """
    if source == "triage":
        from backtalk.tasks.triage import triage_tasks

        made = triage_tasks(split=split, levels=levels, count=count, seed=seed)
        _check_ids(made)
        return [_marked(task, world_model_only) for task in made]
    if source.startswith("openenv:"):
        from backtalk.envs.openenv import openenv_tasks

        made = openenv_tasks(source, options, split=split, count=count, seed=seed)
        _check_ids(made)
        return [_marked(task, world_model_only) for task in made]
    every = read_tasks(
        source, host_packages=host_packages, world_model_only=world_model_only, options=options, on_skip=on_skip
    )
    tasks = sorted((task for task in every if task.split is split), key=lambda task: task.id)
    if not tasks and not may_be_empty:
        raise TaskError(
            f"none of the {len(every)} tasks in {source} is of the split {split.value!r}, which a hash of the id "
            "decides (one in five is held out); add tasks, or rename some"
        )
    if len(tasks) > count:
        tasks = sorted(Random(f"tasks/{seed}").sample(tasks, count), key=lambda task: task.id)
    return tasks


def read_tasks(
    source: str,
    *,
    host_packages: bool = False,
    world_model_only: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    on_skip: Callable[[str], None] | None = None,
) -> list[Task]:
    """Every task of a source that can run on this machine, whatever its split.

    A source is "workbench", a task folder or a folder of them, a .jsonl or .parquet file or a folder of such files,
    "hf:owner/name[:split]", or "awm:WHICH". ``on_skip`` is told of each task whose tools this machine has not got.
    ``world_model_only`` marks them all as scored by nobody; ``host_packages`` is that of ``read_harbor_task``.

    Raises:
        ConfigError: there is no such source.
        TaskError: a task cannot be read, two have one id, or the tools of all of them are missing.
    """
    from backtalk.tasks.needs import missing_tools

    every = [_marked(task, world_model_only) for task in _read(source, host_packages, world_model_only, options)]
    _check_ids(every)
    missing = {task.id: ", ".join(missing_tools(task)) for task in every}
    for name, tools in missing.items():
        if tools and on_skip is not None:
            on_skip(f"task {name!r} is left out: this machine has no {tools}")
    if all(missing.values()):
        tools = ", ".join(sorted({tool for names in missing.values() for tool in names.split(", ")}))
        raise TaskError(f"none of the {len(every)} tasks in {source} can run: install {tools} on this machine")
    return [task for task in every if not missing[task.id]]


def _read(source: str, host_packages: bool, world_model_only: bool, options: Mapping[str, Any]) -> list[Task]:
    if source.startswith("awm:"):
        from backtalk.envs.awm import awm_tasks

        return awm_tasks(source, options)
    if source in WRITTEN:
        from backtalk.tasks.folder import load_harbor_tasks

        return load_harbor_tasks(str(resources.files("backtalk").joinpath("assets/tasks", source)))
    from backtalk.tasks.rows import SUFFIXES, read_hub, read_row_file

    if source.startswith("hf:"):
        return read_hub(source, world_model_only=world_model_only)
    path = Path(source)
    if path.is_file() and path.suffix in SUFFIXES:
        return read_row_file(path, host_packages=host_packages, world_model_only=world_model_only)
    if not path.is_dir():
        raise ConfigError(
            f"tasks={source!r} is neither 'triage' nor a folder; give the path of a folder of tasks or of a .jsonl or "
            f".parquet file, hf:owner/name, openenv:WHERE, awm:WHICH, or one of this package ({', '.join(WRITTEN)})"
        )
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    if files and not (path / "task.toml").exists():
        each = [read_row_file(file, host_packages=host_packages, world_model_only=world_model_only) for file in files]
        return [task for tasks in each for task in tasks]
    from backtalk.tasks.folder import load_harbor_tasks

    return load_harbor_tasks(source, host_packages=host_packages, world_model_only=world_model_only)


def _marked(task: Task, world_model_only: bool) -> Task:
    return replace(task, metadata={**task.metadata, "world_model_only": True}) if world_model_only else task


def _check_ids(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise TaskError(f"two tasks have the id {task.id!r}, and results could not be told apart; rename one")
        seen.add(task.id)
