"""Put the command line together. A command imports heavy libraries only when it runs, so that help is instant."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from backtalk import __version__
from backtalk.cli.account import account
from backtalk.cli.capture import capture
from backtalk.cli.check import check
from backtalk.cli.doctor import doctor
from backtalk.cli.dream import dream
from backtalk.cli.evaluate import evaluate
from backtalk.cli.export import export
from backtalk.cli.import_trajectories import import_trajectories
from backtalk.cli.interrupts import Interrupted, disk_is_full, file_is_too_large
from backtalk.cli.options import fail
from backtalk.cli.score import score
from backtalk.cli.serve import serve
from backtalk.cli.settings import settings
from backtalk.cli.show import report, show
from backtalk.cli.study import study
from backtalk.cli.tasks import tasks_app
from backtalk.cli.train import train
from backtalk.cli.view import view
from backtalk.errors import BacktalkError

app = typer.Typer(
    name="backtalk",
    help=(
        "Train LLM agents on their rewards and on what the environment answers (GRPO + ECHO).\n\n"
        "Begin with `backtalk doctor`, which says what this machine can do, then `backtalk train --preset triage`."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    train,
    view,
    show,
    report,
    score,
    evaluate,
    dream,
    study,
    settings,
    serve,
    capture,
    account,
    export,
    doctor,
    check,
):
    app.command()(command)
app.command("import")(import_trajectories)
app.add_typer(tasks_app, name="tasks")


def main() -> None:
    """Run the `backtalk` command; print mistakes as messages, and bugs, or all errors with --debug, as tracebacks."""
    _speak_any_encoding()
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries of PyTorch end the process where there is no current folder
        fail("the folder that this shell is in was deleted; cd to another one")
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # it may stand anywhere
    try:
        app()
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        message = None if debug else explain(error)
        if message is None:
            raise
        fail(message, exit_code=1 if isinstance(error, OSError) else 2)


def _speak_any_encoding() -> None:
    """Make names of files UTF-8 and printing never fail, whatever the locale and the terminal.

    Libraries that are not Python's open files by UTF-8 names alone. So under another locale Python begins anew in its
    UTF-8 mode, and goes on to print in the terminal's encoding, with "?" for what that has not got.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and sys.executable:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        env = {"PYTHONIOENCODING": encoding} | os.environ
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], env)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    for argument in sys.argv[1:]:
        if any("\udc80" <= character <= "\udcff" for character in argument):
            fail(f"{argument!r} is not UTF-8 text; rename what it names, or give it another way")


def explain(error: BaseException) -> str | None:
    """Return the message to print for an error, or None for a bug, whose traceback helps more."""
    if isinstance(error, BaseExceptionGroup):
        messages = [explain(inner) for inner in error.exceptions]
        return None if None in messages else "; ".join(dict.fromkeys(m for m in messages if m))
    if isinstance(error, BacktalkError):
        return str(error)
    if disk_is_full(error):
        return (
            f"the disk is full ({error}). What was written before is whole; make room, then continue a training "
            "with: backtalk train --out RUN --resume"
        )
    if file_is_too_large(error):
        return (
            f"a file would become larger than this shell allows ({error}); allow it with `ulimit -f unlimited`. "
            "What was written before is whole; continue a training with: backtalk train --out RUN --resume"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}; check the path, and whether you may read and write there"
    return None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"backtalk {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of messages.")] = False,
) -> None:
    """Declare the options of every command; ``main`` takes --debug out before this is reached."""
