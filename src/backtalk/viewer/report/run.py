"""Write the report of a run folder."""

from __future__ import annotations

from pathlib import Path

from backtalk.files import write_bytes
from backtalk.run.log import RunLog
from backtalk.viewer.live.export import write_page
from backtalk.viewer.report.curves import draw_run, finish

MAX_TOKENS = 50_000  # of the rollouts inside a report: about a megabyte


def write_report(folder: str | Path) -> Path:
    """Write report.html and curves.png into a run folder, finished or not; return the path of the page.

    Raises:
        DataError: the folder is no run.
    """
    log = RunLog(folder)
    log.read_config()  # refuses a folder that holds no run
    evaluations = {step: log.read_evaluation(step) for step in log.evaluation_steps()}
    write_bytes(log.folder / "curves.png", finish(draw_run(log.read_metrics(), evaluations)))
    return write_page([log.folder], log.folder / "report.html", max_tokens=MAX_TOKENS)
