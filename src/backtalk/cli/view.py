"""`backtalk view`: the live page over runs, studies and files of trajectories."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from backtalk.cli.interrupts import Interrupted, run
from backtalk.errors import ConfigError, DataError

HOST = "127.0.0.1"
FIRST_PORT = 7870
PORTS_TRIED = 20


def view(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Run folders, studies, folders of them, or files of trajectories in any format that import reads. "
            "Without any: runs/.",
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Without it: the first free one from {FIRST_PORT} on.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Whose tokenizer the files are of: a folder, a Hugging Face name, or base. Runs know it."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the page to one file, to send to somebody.")
    ] = None,
) -> None:
    """Look at runs and rollouts in the browser, also while they are being made. Nothing is ever written.

    Only this machine reaches the page. With --export the page as it is now becomes one file with everything inside.

    Examples: `backtalk view runs/study jobs/trajectories.jsonl --open`, `backtalk view runs/mine --export mine.html`.
    """
    chosen = paths or [Path("runs")]
    for path in chosen:
        if not path.exists():
            raise DataError(f"{path} does not exist; pass a run folder, a folder of runs, or a file of trajectories")
    if export is None:
        _serve(chosen, model, port, open_browser)
        return
    if export.suffix != ".html":
        raise ConfigError(f"--export {export} ends in {export.suffix!r}; end the name in .html")
    from backtalk.viewer.live.export import write_page

    write_page(chosen, export, model=model)
    typer.echo(f"Written: {export} ({export.stat().st_size / 1e6:.1f} MB)")
    if open_browser:
        typer.launch(str(export.resolve()))


def _serve(chosen: list[Path], model: str | None, port: int | None, open_browser: bool) -> None:
    try:
        from backtalk.viewer.live.app import make_app
    except ImportError as error:
        raise ConfigError(
            f"the page needs starlette and uvicorn ({error}); type: pip install 'backtalk[view]'"
        ) from error
    from backtalk.run.serve import listen, serve_application
    from backtalk.viewer.live.sources import Library

    port = _free_port() if port is None else port
    with listen(HOST, port) as listener:
        library = Library(chosen, model)
        address = f"http://{HOST}:{port}/"
        typer.echo(f"Runs and files found: {len(library.sources())}. Open {address} ; Ctrl-C ends it.", err=True)
        if open_browser:
            typer.launch(address)
        try:
            run(serve_application(make_app(library), listener))
        except Interrupted:
            typer.echo("Ended.", err=True)
        finally:
            library.close()


def _free_port() -> int:
    for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ConfigError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1} are all taken; pass one with --port")
