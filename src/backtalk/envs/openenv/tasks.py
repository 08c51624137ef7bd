"""Makes the tasks of an OpenEnv environment: from the rows of a file, or one for each seed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.errors import TaskError
from backtalk.tasks.task import Split, Task


def openenv_tasks(location: str, config: OpenEnvConfig, *, split: Split, count: int, seed: int = 0) -> list[Task]:
    """Draw at most ``count`` tasks of one split by ``seed``, of the environment at ``location``.

    A task is the arguments of a reset. Without a ``tasks`` file there is one for each number below ``seeds``: with
    ``folds`` in each fold, else the hash of the id decides the split.

    Raises:
        TaskError: the tasks file cannot be read; the message names every bad row.
    """
    if config.tasks is not None:
        tasks = [task for task in _read_rows(Path(config.tasks), config) if task.split is split]
        return tasks if len(tasks) <= count else Random(f"tasks/{seed}").sample(tasks, count)
    numbers = list(range(config.seeds))
    Random(f"openenv/{seed}").shuffle(numbers)
    tasks = (_seed_task(location, config, split, number) for number in numbers)
    return list(islice((task for task in tasks if task.split is split), count))


def _read_rows(path: Path, config: OpenEnvConfig) -> list[Task]:
    """Read tasks from a JSONL file with ``id`` and optional ``instruction``, ``reset`` and ``fold`` in each row."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks={str(path)!r} cannot be read ({error}); write a row a line as JSON") from error
    tasks, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tasks.append(_row_task(json.loads(line), config))
            except (ValueError, RecursionError) as error:
                wrong.append(f"line {number}: {error}")
    if wrong or not tasks:
        raise TaskError(f"{path} holds no tasks that can be played: {'; '.join(wrong) or 'it is empty'}")
    return tasks


def _seed_task(location: str, config: OpenEnvConfig, split: Split, number: int) -> Task:
    name = location.rstrip("/").rpartition("/")[2]
    fold = f"{split.value}/" if config.folds else ""
    return Task(
        id=f"{name}/{fold}{config.seed_argument}-{number}",
        instruction=config.instruction,
        fold=split if config.folds else None,
        metadata={"reset": {**config.folds.get(split.value, {}), config.seed_argument: number}},
    )


def _row_task(row: Any, config: OpenEnvConfig) -> Task:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"]:
        raise ValueError("a row is an object with an id, a text")
    for name, kind in (("instruction", str), ("reset", dict)):
        if not isinstance(row.get(name, kind()), kind):
            raise ValueError(f"{name}={row[name]!r} is no {'text' if kind is str else 'object'}")
    fold = row.get("fold")
    if fold not in (None, *Split):
        raise ValueError(f"fold={fold!r} is no fold; use train or held_out")
    return Task(
        id=row["id"],
        instruction=row.get("instruction", config.instruction),
        fold=None if fold is None else Split(fold),
        metadata={"reset": row.get("reset", {})},
    )
