"""`backtalk report`: write the page and the curves of a run or a study."""

from __future__ import annotations

import typer

from backtalk.cli.options import RunFolder


def report(folder: RunFolder) -> None:
    """Write report.html and the curves of a run again, or those of a study."""
    if (folder / "study.json").exists():
        from backtalk.viewer.web.study import write_study_report as write
    else:
        from backtalk.viewer.web.report import write_report as write

    typer.echo(f"Report: {write(folder)}")
