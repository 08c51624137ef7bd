"""Tasks of an OpenEnv environment: the rows of a file, or one for each seed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.errors import TaskError
from backtalk.tasks.task import Split, Task


def openenv_tasks(where: str, config: OpenEnvConfig, *, split: Split, count: int, seed: int = 0) -> list[Task]:
    """Return at most ``count`` tasks of one split, drawn by ``seed``, of the environment at ``where``.

    A task is the arguments of a reset. Without a ``tasks`` file there is one for each number below ``seeds``: with
    ``folds`` each fold's own, else the hash of their ids keeps the splits apart.

    Raises:
        TaskError: the tasks file cannot be read; every row that is wrong is named.
    """
    if config.tasks is not None:
        tasks = [task for task in read_rows(Path(config.tasks), config) if task.split is split]
        return tasks if len(tasks) <= count else Random(f"tasks/{seed}").sample(tasks, count)
    numbers = list(range(config.seeds))
    Random(f"openenv/{seed}").shuffle(numbers)
    made = (_numbered(where, config, split, number) for number in numbers)
    return list(islice((task for task in made if task.split is split), count))


def read_rows(path: Path, config: OpenEnvConfig) -> list[Task]:
    """The tasks of a JSONL file, a row each: ``id``, and ``instruction``, ``reset`` and ``fold`` where it has them."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks={str(path)!r} cannot be read ({error}); write a row a line as JSON") from error
    tasks, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tasks.append(_task(json.loads(line), config))
            except (ValueError, RecursionError) as error:
                wrong.append(f"line {number}: {error}")
    if wrong or not tasks:
        raise TaskError(f"{path} holds no tasks that can be played: {'; '.join(wrong) or 'it is empty'}")
    return tasks


def _numbered(where: str, config: OpenEnvConfig, split: Split, number: int) -> Task:
    name = where.rstrip("/").rpartition("/")[2]
    fold = split if config.folds else None
    inside = f"{split.value}/" if config.folds else ""
    return Task(
        id=f"{name}/{inside}{config.seed_argument}-{number}",
        instruction=config.instruction,
        fold=fold,
        metadata={"reset": {**config.folds.get(split.value, {}), config.seed_argument: number}},
    )


def _task(row: Any, config: OpenEnvConfig) -> Task:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"]:
        raise ValueError("a row is an object with an id, a text")
    for name, kind in (("instruction", str), ("reset", dict)):
        if not isinstance(row.get(name, kind()), kind):
            raise ValueError(f"{name}={row[name]!r} is no {'text' if kind is str else 'object'}")
    fold = row.get("fold")
    if fold not in (None, *(each.value for each in Split)):
        raise ValueError(f"fold={fold!r} is no fold; use train or held_out")
    return Task(
        id=row["id"],
        instruction=row.get("instruction", config.instruction),
        fold=None if fold is None else Split(fold),
        metadata={"reset": row.get("reset", {})},
    )
