"""`backtalk evaluate`: measure a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backtalk.interrupts import run


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `backtalk train` made it.")],
    tasks: Annotated[int | None, typer.Option(min=1, help="Held-out tasks.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Attempts at each, the k of pass@k.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Measure the model that the run began with.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be given many times."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Measure the policy of a run on held-out tasks: pass@1, pass@k, cross-entropy, each with its 95 % interval."""
    import json

    from rich.console import Console

    from backtalk.progress import RunDisplay, evaluation_table
    from backtalk.runlog.files import write_bytes
    from backtalk.train import evaluate_run

    overrides = list(settings or [])
    overrides += [f"evaluation.tasks={tasks}"] if tasks else []
    overrides += [f"evaluation.samples_per_task={samples}"] if samples else []
    console = Console()
    with RunDisplay(console) as display:
        evaluation = run(evaluate_run(folder, overrides=overrides, base=base, on_event=display.show))
    console.print(evaluation_table(evaluation))
    if json_path is not None:
        write_bytes(json_path, json.dumps(evaluation.to_dict(), indent=1).encode())
