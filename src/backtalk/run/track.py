"""Send a run's metrics to a dashboard while it goes on. The run folder holds them all in any case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from backtalk.errors import ConfigError
from backtalk.run.events import EvaluationDone, Event, OnEvent, StepDone

Log = Callable[[int, Mapping[str, float]], None]
PROJECT = "backtalk"
ESTIMATES = ("pass_at_1", "pass_at_k", "reward", "env_ce_recorded", "env_ce_own")


class Dashboard(StrEnum):
    """Dashboards that metrics can be sent to. Each needs the extra of its name; trackio's is called track."""

    TRACKIO = "trackio"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


@contextmanager
def tracking(dashboard: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[OnEvent]:
    """Open a dashboard for one run; yield a callback for the run's events.

    Raises:
        ConfigError: no such dashboard, or the package for it is not installed.
    """
    if dashboard not in set(Dashboard):
        raise ConfigError(f"--track {dashboard} is unknown; use {', '.join(Dashboard)}")
    try:
        log, close = _open(Dashboard(dashboard), folder, settings)
    except ModuleNotFoundError as error:
        extra = "track" if dashboard == Dashboard.TRACKIO else dashboard
        raise ConfigError(
            f"--track {dashboard} needs a package that is not installed ({error.name}); "
            f"type: pip install 'backtalk[{extra}]'"
        ) from error
    try:
        yield lambda event: _forward(event, log)
    finally:
        close()


def _open(dashboard: Dashboard, folder: Path, settings: Mapping[str, Any]) -> tuple[Log, Callable[[], None]]:
    match dashboard:
        case Dashboard.TRACKIO:
            import trackio  # pyright: ignore[reportMissingImports]

            trackio.init(project=PROJECT, name=folder.name, config=dict(settings))
            return lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish
        case Dashboard.WANDB:
            import wandb  # pyright: ignore[reportMissingImports]

            run = wandb.init(project=PROJECT, name=folder.name, config=dict(settings), dir=str(folder), resume="allow")
            return lambda step, metrics: run.log(dict(metrics), step=step), run.finish
        case Dashboard.TENSORBOARD:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def log(step: int, metrics: Mapping[str, float]) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

            return log, writer.close


def _forward(event: Event, log: Log) -> None:
    """Send an event's metrics. The step is the number of updates so far: 0 for an evaluation before the first."""
    match event:
        case StepDone():
            log(event.step + 1, _finite({f"train/{name}": value for name, value in event.metrics.items()}))
        case EvaluationDone():
            intervals = {name: getattr(event.evaluation, name) for name in ESTIMATES}
            values = {f"held_out/{name}": interval.value for name, interval in intervals.items() if interval}
            log(event.evaluation.step, _finite(values))


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that could be measured in this step: dashboards draw a NaN as a gap or not at all."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
