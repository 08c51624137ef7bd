"""`backtalk study`: train several arms with several seeds, and compare them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from backtalk.cli.interrupts import Interrupted, run
from backtalk.cli.options import Settings, new_console, new_folder
from backtalk.cli.show import report


def study(
    source: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, for example demo, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the study. Without it: a new one in runs/.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Without it: one a core.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds instead of the study's own.")] = None,
    settings: Settings = None,
) -> None:
    """Train several arms, each with several seeds, and compare them: a table with intervals, and a picture.

    `backtalk study demo` trains GRPO and GRPO+ECHO side by side, in minutes on two cores.
    """
    from backtalk.evidence.study import load_study, run_study

    plan = load_study(source, seeds=seeds, overrides=list(settings or []))
    from backtalk.cli.progress import StudyDisplay, comparison_table

    folder = out or new_folder(plan.name)
    console = new_console()
    try:
        with StudyDisplay(console) as display:
            comparison = run(run_study(plan, folder, parallel=parallel, on_event=display.show))
    except Interrupted:
        typer.echo(f"Stopped. Continue with: backtalk study {source} --out {folder}", err=True)
        raise
    console.print(comparison_table(comparison))
    for name, results in comparison.elsewhere.items():
        console.print(f"\n[bold]Elsewhere: {name}[/bold]")
        console.print(comparison_table(replace(comparison, results=results)))
    report(folder)
    typer.echo(f"Picture: {folder / 'study.png'}")
