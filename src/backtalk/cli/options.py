"""Options that several commands share, the console they print on, and the folders they make."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `backtalk train` made it.")]
OptionalRunFolder = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="A run folder, as `backtalk train` made it.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be given many times."),
]

HostPackages = Annotated[
    bool,
    typer.Option("--host-packages", help="This machine has what the tasks install: leave out what installs packages."),
]

OnRefuseChoice = Annotated[
    str, typer.Option("--on-refuse", help="About task folders that cannot be read: stop, or skip and name them.")
]


def on_refuse_choice(given: str) -> Literal["stop", "skip"]:
    """Return what --on-refuse says.

    Raises:
        ConfigError: it is neither stop nor skip.
    """
    match given:
        case "stop" | "skip":
            return given
    raise ConfigError(f"--on-refuse {given} is unknown; use stop or skip")


def new_console() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    return Console()


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
