"""`backtalk train`: train a policy into a run folder, or resume one."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.cli.heartbeat import Heartbeat
from backtalk.cli.interrupts import Interrupted, run
from backtalk.cli.options import Settings, new_console, new_folder
from backtalk.cli.show import report
from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from backtalk.run.config import TrainConfig
    from backtalk.run.events import Event, OnEvent


def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="Settings; a file names only what differs.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Settings that come with Backtalk, for example triage.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face causal LM, a folder with one, base or shop (embedded).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Without it: a new one in runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its checkpoint.")] = False,
    openenv: Annotated[
        str | None, typer.Option(metavar="WHERE", help="Train in an OpenEnv environment: a URL, or a folder with one.")
    ] = None,
    settings: Settings = None,
    track: Annotated[
        str | None, typer.Option(help="Send metrics to a dashboard too: trackio, wandb or tensorboard.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a step went; trace.json is for Perfetto.")
    ] = False,
) -> None:
    """Train a policy, and measure it on held-out tasks before and after.

    The run folder gets the resolved settings, metrics.jsonl, every trajectory, a checkpoint, report.html and curves.

    Examples: `backtalk train --preset triage`,
    `backtalk train my.yaml --model Qwen/Qwen3-0.6B --set steps=100 --out runs/qwen`,
    `backtalk train --out runs/qwen --resume`.
    """
    overrides = list(settings or []) + ([f"engine.model={model}"] if model else [])
    overrides += [f"tasks.source=openenv:{openenv}"] if openenv else []
    console = new_console(lasting=True)
    say = None if console.is_terminal else (lambda text: console.print(text, markup=False, highlight=False))
    with Heartbeat(say, "loading PyTorch, the model and the tasks") as heartbeat:
        resolved = _resolve(config, preset, overrides, out, resume)
        folder = out or new_folder(preset or Path(config or "run").stem)
        _train(resolved, folder, resume, track, profile, console, heartbeat)
        report(folder)


def _train(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    track: str | None,
    profile: bool,
    console: Console,
    heartbeat: Heartbeat,
) -> None:
    from backtalk.cli.progress import RunDisplay
    from backtalk.run.config import config_to_dict
    from backtalk.run.profile import profiling
    from backtalk.run.track import tracking
    from backtalk.run.train import train as run_training

    with ExitStack() as stack:
        listeners: list[OnEvent] = [stack.enter_context(RunDisplay(console, heartbeat=heartbeat)).show]
        if track is not None:
            listeners.append(stack.enter_context(tracking(track, folder, config_to_dict(config))))
        if profile:
            say = partial(console.print, markup=False, highlight=False)
            listeners.append(stack.enter_context(profiling(folder, say)))

        def on_event(event: Event) -> None:
            for listener in listeners:
                listener(event)

        try:
            run(run_training(config, folder, resume=resume, on_event=on_event))
        except Interrupted:
            stack.close()
            if (folder / "config.yaml").exists():
                typer.echo(f"Stopped. Continue with: backtalk train --out {folder} --resume", err=True)
            raise


def _resolve(
    config: str | None, preset: str | None, overrides: list[str], out: Path | None, resume: bool
) -> TrainConfig:
    """Return the settings to train with; where nothing names them, those of the run that is resumed."""
    if config and preset:
        raise ConfigError(f"got both {config!r} and --preset {preset!r}; give one, and change settings with --set")
    if resume and out is None:
        raise ConfigError("--resume needs to know which run; type `backtalk train --out RUN --resume`")
    source = preset or config
    names_tasks = any(override.partition("=")[0].strip() == "tasks.source" for override in overrides)
    if source is None and not resume and not names_tasks:
        raise ConfigError(
            "nothing says what to train; type `backtalk train --preset triage`, name a CONFIG.yaml, or give the tasks "
            "with --openenv WHERE or --set tasks.source=WHERE"
        )
    from backtalk.run.config import config_from_dict, load_config
    from backtalk.run.log import RunLog

    if source is not None:
        return load_config(source, overrides)
    return config_from_dict(RunLog(out).read_config() if resume and out is not None else {}, overrides)
