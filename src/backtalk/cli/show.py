"""`backtalk show` and `backtalk report`: one rollout of a run in the terminal, or the page of a run or a study."""

from __future__ import annotations

from typing import Annotated

import typer

from backtalk.cli.options import RunFolder, new_console
from backtalk.errors import ConfigError


def show(
    folder: RunFolder,
    step: Annotated[int | None, typer.Option(min=0, help="Training step, from 0. Without it: the last.")] = None,
    task: Annotated[str | None, typer.Option(help="Id of the task, instead of --group.")] = None,
    group: Annotated[int, typer.Option(min=0, help="Which task of the step, from 0.")] = 0,
    index: Annotated[int, typer.Option(min=0, help="Which rollout of the task, from 0.")] = 0,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="The held-out evaluation before that step instead of the step.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the tasks of the step and their rewards.")] = False,
) -> None:
    """Show one rollout, every token coloured by who made it, with the weight it was trained at."""
    from backtalk.viewer.data import find_groups, find_rollout
    from backtalk.viewer.terminal import list_groups, render

    if listing or task is not None:
        groups = find_groups(folder, step=step, evaluation=evaluation)
        if listing:
            new_console().print(list_groups(groups))
            return
        ids = [found.task_id for found in groups]
        if task not in ids:
            raise ConfigError(f"no task {task!r} in that step; it has {', '.join(ids)}")
        group = ids.index(task)
    new_console().print(render(find_rollout(folder, step=step, group=group, sample=index, evaluation=evaluation)))


def report(folder: RunFolder) -> None:
    """Write report.html and the curves of a run again, or those of a study."""
    if (folder / "study.json").exists():
        from backtalk.viewer.report.study import write_study_report as write
    else:
        from backtalk.viewer.report.run import write_report as write

    typer.echo(f"Report: {write(folder)}")
