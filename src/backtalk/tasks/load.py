"""Load the tasks that a source names: generated ones, task folders, rows of files or of datasets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from random import Random
from typing import Literal

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.root import Root
from backtalk.tasks.task import Split, Task

OnRefuse = Literal["stop", "skip"]  # of a source with folders that cannot be read
LIST_SUFFIX = ".txt"  # of a list of task folders
_VARIES = re.compile(r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"|(?<!\S)/(?=\S*/)\S+")  # what is quoted, and paths
SHIPPED = ("workbench",)  # datasets of task folders that come with the package


def load_tasks(
    source: str,
    *,
    split: Split,
    count: int,
    seed: int = 0,
    levels: Sequence[int] = (1, 2),
) -> list[Task]:
    """Return at most ``count`` tasks of one split, generated from the seed ("triage") or drawn by it from a source.

    ``levels`` are the difficulties of triage. A source without a task of that split gives none; ``read_tasks`` and
    ``draw_tasks`` do the same with more options.

    Raises:
        ConfigError: there is no such source.
        TaskError: a task cannot run, or two have one id.
    """
    if source == "triage":
        from backtalk.tasks.triage import triage_tasks

        return triage_tasks(split=split, levels=levels, count=count, seed=seed)
    return draw_tasks(read_tasks(source), split, count, seed)


def draw_tasks(tasks: Sequence[Task], split: Split, count: int, seed: int) -> list[Task]:
    """Return at most ``count`` tasks of one split, drawn by ``seed``, sorted by id."""
    chosen = sorted((task for task in tasks if task.split is split), key=lambda task: task.id)
    if len(chosen) > count:
        chosen = sorted(Random(f"tasks/{seed}").sample(chosen, count), key=lambda task: task.id)
    return chosen


def read_tasks(
    source: str,
    *,
    host_packages: bool = False,
    world_model_only: bool = False,
    on_skip: Callable[[str], None] | None = None,
    on_refuse: OnRefuse = "stop",
    root: Root | None = None,
) -> list[Task]:
    """Return all tasks of a source that can run on this machine, of both splits.

    A source is "workbench", a task folder or a folder of them, a .txt list of task folders, a .jsonl or .parquet file
    or a folder of such files, or "hf:owner/name[:split]". ``on_skip`` is called with a line of text for each task whose
    tools are missing, on this machine or in the ``root`` that sandboxes start from. ``on_refuse="skip"`` leaves out
    folders that cannot be read too, each told to ``on_skip`` with its reason, and then their counts by reason.
    ``world_model_only=True`` marks tasks as not scored, so that they need no verifier; ``host_packages`` is that of
    ``read_harbor_task``.

    Raises:
        ConfigError: there is no such source.
        TaskError: a task cannot be read, two have one id, or this machine lacks the tools of all of them.
    """
    from backtalk.tasks.needs import missing_tools

    say = on_skip or (lambda text: None)
    refused: dict[str, str] = {}

    def note(folder: Path, reason: str) -> None:
        refused[folder.name] = reason_kind(reason, folder)
        say(f"task folder {folder.name!r} is left out: {reason}")

    tasks = _read_all(source, host_packages, world_model_only, note if on_refuse == "skip" else None)
    if refused:
        counts = "; ".join(f"{count} x {kind}" for kind, count in Counter(refused.values()).most_common())
        say(f"{len(refused)} of {len(refused) + len(tasks)} task folders of {source} are left out: {counts}")
    check_unique_ids((task, source) for task in tasks)
    missing = {task.id: ", ".join(missing_tools(task, root)) for task in tasks}
    where = "this machine" if root is None else f"the root {root.name}"
    for name, tools in missing.items():
        if tools:
            say(f"task {name!r} is left out: {where} has no {tools}")
    if all(missing.values()):
        tools = ", ".join(sorted({tool for names in missing.values() for tool in names.split(", ")}))
        raise TaskError(f"none of the {len(tasks)} tasks in {source} can run: install {tools} on {where}")
    return [task for task in tasks if not missing[task.id]]


def reason_kind(reason: str, folder: Path) -> str:
    """Return a reason without its folder, line number, quotations and advice, so that like reasons can be counted."""
    reason = reason.replace(f"{folder.absolute()}", "").replace(f"{folder}", "").partition("\n")[0]
    reason = _VARIES.sub("...", re.sub(r", line \d+", "", reason).lstrip("/: "))
    return re.split(r";|(?<!\.)\. |: the reward ", reason)[0]


def read_list(path: Path) -> list[Path]:
    """Return the task folders that a list names, one a line, from where the list lies; # begins a comment.

    Raises:
        TaskError: one is no folder, or there is none.
    """
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    folders = [path.parent / line for line in lines if line and not line.startswith("#")]
    for folder in folders:
        if not folder.is_dir():
            raise TaskError(f"{path} names {str(folder)!r}, which is no folder; write the path of a task folder a line")
    if not folders:
        raise TaskError(f"{path} names no task folder; write one a line, or let `backtalk tasks check` write it")
    return folders


def check_unique_ids(tasks: Iterable[tuple[Task, str]]) -> None:
    """Check that tasks, given with the name of their source, have distinct ids.

    Raises:
        TaskError: two tasks share an id.
    """
    sources: dict[str, str] = {}
    for task, source in tasks:
        if task.id in sources:
            raise TaskError(
                f"the task {task.id!r} is in {sources[task.id]!r} and again in {source!r}, and results could not be "
                "told apart; rename one, or take it out"
            )
        sources[task.id] = source


def _read_all(
    source: str, host_packages: bool, world_model_only: bool, on_refused: Callable[[Path, str], None] | None
) -> list[Task]:
    from backtalk.tasks.folder import load_harbor_tasks, read_folders
    from backtalk.tasks.rows import SUFFIXES, read_hub, read_row_file

    if source in SHIPPED:
        return load_harbor_tasks(str(resources.files("backtalk").joinpath("assets/tasks", source)))
    if source.startswith("hf:"):
        return read_hub(source, world_model_only=world_model_only)
    path, flags = Path(source), {"host_packages": host_packages, "world_model_only": world_model_only}
    if path.is_file() and path.suffix == LIST_SUFFIX:
        return read_folders(read_list(path), source, **flags, on_refused=on_refused)
    if path.is_file() and path.suffix in SUFFIXES:
        return read_row_file(path, **flags)
    if not path.is_dir():
        raise ConfigError(
            f"tasks={source!r} is neither 'triage' nor a folder; give the path of a folder of tasks or of a .txt, "
            f".jsonl or .parquet file, hf:owner/name, openenv:WHERE, awm:WHICH, package.module:World, or one of this "
            f"package ({', '.join(SHIPPED)})"
        )
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    if not files or (path / "task.toml").exists():
        return load_harbor_tasks(source, **flags, on_refused=on_refused)
    rows = [read_row_file(file, **flags) for file in files]
    return list(chain.from_iterable(rows))
