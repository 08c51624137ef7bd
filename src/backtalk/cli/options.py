"""Options that several commands share, the policy they name, the console they print on, the folders they make."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from backtalk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from backtalk.run.config import TrainConfig

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `backtalk train` made it.")]
OptionalRunFolder = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="A run folder, as `backtalk train` made it.")
]


def _check_overrides(given: list[str] | None) -> list[str] | None:
    for override in given or ():
        if "=" not in override:
            raise ConfigError(
                f"--set {override} has no =; write --set {override}=VALUE, without spaces, for example --set steps=100"
            )
    return given


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting; may be given many times.", callback=_check_overrides
    ),
]

HostPackages = Annotated[
    bool,
    typer.Option("--host-packages", help="This machine has what the tasks install: leave out what installs packages."),
]

OnRefuseChoice = Annotated[
    str, typer.Option("--on-refuse", help="About task folders that cannot be read: stop, or skip and name them.")
]


def on_refuse_choice(given: str) -> Literal["stop", "skip"]:
    """Return the value of --on-refuse, checked.

    Raises:
        ConfigError: it is neither stop nor skip.
    """
    match given:
        case "stop" | "skip":
            return given
    raise ConfigError(f"--on-refuse {given} is unknown; use stop or skip")


def new_console(*, lasting: bool = False) -> Console:
    """Return a console on standard output; if it is ``lasting``, the work goes on when nobody reads it."""
    from rich.console import Console

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            typer.echo("note: nobody reads the output any more; the work goes on", err=True)

    return LastingConsole() if lasting else Console()


def new_folder(name: str) -> Path:
    """Return the first of runs/name, runs/name-2, ... that does not exist."""
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def fail(message: str, *, exit_code: int = 2) -> NoReturn:
    """Print an error on standard error, in red where that is a terminal, and exit."""
    typer.secho(f"Error: {message}", fg="red", err=True)
    sys.exit(exit_code)


def policy_settings(
    folder: Path | None, model: str | None, base: bool, overrides: list[str]
) -> tuple[TrainConfig, Path | None]:
    """Return a run's settings and its checkpoint; for ``model``, those settings or the defaults, and no checkpoint.

    Raises:
        ConfigError: neither a run nor a model is named.
        DataError: the run has no checkpoint yet.
    """
    from backtalk.engines.checkpoint import find_checkpoint
    from backtalk.run.config import config_from_dict
    from backtalk.run.log import RunLog

    if folder is None and model is None:
        raise ConfigError("nothing names a policy; give a RUN, or --model NAME")
    tree = {} if folder is None else RunLog(folder).read_config()
    checkpoint = None
    if folder is not None and model is None and not base:
        checkpoint = find_checkpoint(RunLog(folder).checkpoint_path)
        if checkpoint is None:
            raise DataError(f"{folder} has no checkpoint yet; wait for one, or take the model it began with (--base)")
    return config_from_dict(tree, overrides + ([f"engine.model={model}"] if model else [])), checkpoint
