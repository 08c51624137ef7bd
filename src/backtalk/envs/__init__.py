"""Tasks and the worlds they run in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from backtalk.envs.base import Split, Task
from backtalk.errors import ConfigError, TaskError

__all__ = ["load_tasks"]


def load_tasks(
    source: str,
    *,
    split: Split,
    count: int,
    levels: Sequence[int] = (1, 2),
    seed: int = 0,
    host_packages: bool = False,
) -> list[Task]:
    """``count`` tasks of one split: made from the seed ("triage"), or drawn by it from a folder of Harbor tasks.

    A folder that holds fewer gives what it holds, sorted by id. ``levels`` matter to triage only,
    ``host_packages`` to folders only (see ``read_harbor_task``).

    Raises:
        ConfigError: there is no such source.
        TaskError: a task cannot run, two have one id, or the split is empty.
    """
    if source == "triage":
        from backtalk.envs.triage import triage_tasks

        tasks = triage_tasks(split=split, levels=levels, count=count, seed=seed)
        _check_ids(tasks)
    elif Path(source).is_dir():
        from backtalk.envs.harbor import load_harbor_tasks

        every = load_harbor_tasks(source, host_packages=host_packages)
        _check_ids(every)
        tasks = [task for task in every if task.split is split]
        if not tasks:
            raise TaskError(
                f"none of the {len(every)} tasks in {source} is of the split {split.value!r}, which a hash of the id "
                "decides (one in five is held out); add tasks, or rename some"
            )
        if len(tasks) > count:
            tasks = Random(f"tasks/{seed}").sample(sorted(tasks, key=lambda task: task.id), count)
        tasks = sorted(tasks, key=lambda task: task.id)
    else:
        raise ConfigError(f"tasks={source!r} is neither 'triage' nor a folder; give the path of a folder of tasks")
    return tasks


def _check_ids(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise TaskError(f"two tasks have the id {task.id!r}, and results could not be told apart; rename one")
        seen.add(task.id)
