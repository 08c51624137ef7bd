"""`backtalk tasks`: write tasks as files."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from backtalk.errors import ConfigError

tasks_app = typer.Typer(help="Tasks as files.", no_args_is_help=True, rich_markup_mode="markdown")


@tasks_app.callback()
def _group() -> None:
    """Keep `write` a subcommand while it is the only one."""


@tasks_app.command("write")
def tasks_write(
    folder: Annotated[Path, typer.Argument(help="Where to write; each task becomes a folder in it.")],
    count: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 10,
    levels: Annotated[list[int] | None, typer.Option("--level", help="Difficulty; may be given many times.")] = None,
    split: Annotated[str, typer.Option(help="train, held_out, or both: four to one.")] = "both",
    seed: Annotated[int, typer.Option(help="Other seeds give other tasks.")] = 0,
) -> None:
    """Write triage tasks as folders in the Harbor format: to look at, to change, or to run elsewhere."""
    from backtalk.tasks.folder import write_harbor_task
    from backtalk.tasks.load import load_tasks
    from backtalk.tasks.task import Split

    match split:
        case "both":  # a training needs some of each
            counts = {Split.TRAIN: count - count // 5, Split.HELD_OUT: count // 5}
        case Split.TRAIN | Split.HELD_OUT:
            counts = {Split(split): count}
        case _:
            raise ConfigError(f"--split {split} is unknown; use {', '.join(Split)} or both")
    wanted = tuple(levels or (1, 2))
    tasks = [load_tasks("triage", split=part, count=n, levels=wanted, seed=seed) for part, n in counts.items() if n]
    for task in chain.from_iterable(tasks):
        target = folder / task.id.replace("/", "-")
        if target.exists():
            raise ConfigError(f"{target} is there already; choose another folder, or remove it")
        write_harbor_task(task, target)
        typer.echo(str(target))
