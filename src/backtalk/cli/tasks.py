"""Run `backtalk tasks`: write tasks as files, and check task folders."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.cli.interrupts import run
from backtalk.cli.options import HostPackages
from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from backtalk.run.check import Finding

SAY_EVERY_S = 10.0
SHOWN = 3  # reasons of one kind

tasks_app = typer.Typer(help="Tasks as files.", no_args_is_help=True, rich_markup_mode="markdown")


@tasks_app.command("write")
def tasks_write(
    folder: Annotated[Path, typer.Argument(help="Where to write; each task becomes a folder in it.")],
    count: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 10,
    levels: Annotated[list[int] | None, typer.Option("--level", help="Difficulty; may be given many times.")] = None,
    split: Annotated[str, typer.Option(help="train, held_out, or both: four to one.")] = "both",
    seed: Annotated[int, typer.Option(help="Other seeds give other tasks.")] = 0,
) -> None:
    """Write triage tasks as folders in the Harbor format: to look at, to change, or to run elsewhere."""
    from backtalk.tasks.folder import write_harbor_task
    from backtalk.tasks.load import load_tasks
    from backtalk.tasks.task import Split

    match split:
        case "both":  # a training needs some of each
            counts = {Split.TRAIN: count - count // 5, Split.HELD_OUT: count // 5}
        case Split.TRAIN | Split.HELD_OUT:
            counts = {Split(split): count}
        case _:
            raise ConfigError(f"--split {split} is unknown; use {', '.join(Split)} or both")
    wanted = tuple(levels or (1, 2))
    tasks = [load_tasks("triage", split=part, count=n, levels=wanted, seed=seed) for part, n in counts.items() if n]
    for task in chain.from_iterable(tasks):
        target = folder / task.id.replace("/", "-")
        if target.exists():
            raise ConfigError(f"{target} is there already; choose another folder, or remove it")
        write_harbor_task(task, target)
        typer.echo(str(target))


@tasks_app.command("check")
def tasks_check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A task folder, a folder of them, or a .txt list.")],
    host_packages: HostPackages = False,
    root: Annotated[
        str | None, typer.Option(help="Root file system that sandboxes start from: that of terminal.root.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="GOOD.txt", help="Write the list of sound tasks, for tasks.source.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every finding to this file.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds for tests, and for a solution.")] = 120,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where an earlier check was interrupted.")] = False,
) -> None:
    """Start every task, score it untouched, run its solution if it has one, and count what is wrong by reason.

    An interrupted check goes on where it stopped. Exits with 0 only where every task is sound.

    Example: `backtalk tasks check my_tasks --host-packages --write good.txt`, then `tasks.source: good.txt`.
    """
    from backtalk.envs.terminal import TerminalConfig
    from backtalk.run.check import Verdict, check_tasks, read_for_check, read_record, record_line
    from backtalk.sandboxes import local_sandbox
    from backtalk.sandboxes.images.open import open_root
    from backtalk.sandboxes.machine.capacity import cores
    from backtalk.sandboxes.pool import PooledBackend

    folders = _folders(folder)
    record = _record_path(folder, host_packages, root)
    if fresh:
        record.unlink(missing_ok=True)
    findings, tasks = read_for_check(folders, host_packages=host_packages, root=open_root(root))
    known = read_record(record)
    if kept := [known[str(path)] for path in tasks if str(path) in known]:
        typer.echo(f"Going on after {len(kept)} of {len(tasks)} tasks of an interrupted check; --fresh begins anew")
    findings += kept
    left = {path: task for path, task in tasks.items() if str(path) not in known}
    if left:
        backend = PooledBackend(local_sandbox("auto", root=root))
        with record.open("a") as file, _progress(len(folders), len(findings)) as advance:

            def keep(finding: Finding) -> None:
                findings.append(finding)
                file.write(record_line(finding))
                file.flush()
                advance(finding.verdict is Verdict.SOUND)

            config = TerminalConfig()
            count = max(2, int(2 * cores()))
            run(check_tasks(left, backend, config, num_concurrent=count, timeout_s=timeout_s, on_finding=keep))
    record.unlink(missing_ok=True)
    _report(findings, len(folders))
    if write is not None:
        _write_list(write, folder, host_packages, findings, len(folders))
    if json_path is not None:
        json_path.write_text("".join(record_line(finding) for finding in findings))
    if any(finding.verdict is not Verdict.SOUND for finding in findings):
        raise typer.Exit(1)


def _folders(folder: Path) -> list[Path]:
    from backtalk.tasks.folder import find_harbor_folders
    from backtalk.tasks.load import LIST_SUFFIX, read_list

    if folder.is_dir():
        return find_harbor_folders(folder)
    if folder.is_file() and folder.suffix == LIST_SUFFIX:
        return read_list(folder)
    raise ConfigError(f"{folder} is no folder and no .txt list of task folders; give the path of one")


def _record_path(folder: Path, host_packages: bool, root: str | None) -> Path:
    """Return the file that keeps the findings of a check until it is done."""
    import hashlib

    from backtalk.sandboxes.root import cache_folder

    key = repr((str(folder.resolve()), host_packages, root))
    return cache_folder("checks") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[bool], None]]:
    """Show a bar on a terminal, else a line every ten seconds; yield what to call as each task is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("checking", total=total, completed=done)
        said_s, unsound = time.monotonic(), 0

        def advance(is_sound: bool) -> None:
            nonlocal done, said_s, unsound
            done, unsound = done + 1, unsound + (not is_sound)
            progress.update(bar, completed=done, description=f"checking ({unsound} unsound in sandboxes)")
            if not console.is_terminal and time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                typer.echo(f"{done} of {total} checked", err=True)

        yield advance


def _report(findings: Sequence[Finding], total: int) -> None:
    """Print the counts by verdict and reason, the most frequent first, with the first few of each."""
    from backtalk.run.check import Verdict

    sound = sum(finding.verdict is Verdict.SOUND for finding in findings)
    typer.echo(f"{sound} of {total} tasks are sound")
    verdicts = Counter(finding.verdict for finding in findings if finding.verdict is not Verdict.SOUND)
    for verdict, count in verdicts.most_common():
        typer.echo(f"\n{count:>5}  {verdict}")
        of_verdict = [finding for finding in findings if finding.verdict is verdict]
        for kind, number in Counter(finding.kind for finding in of_verdict).most_common():
            if kind and kind != verdict:
                typer.echo(f"{number:>9}  {kind}")
            for finding in [finding for finding in of_verdict if finding.kind == kind][:SHOWN]:
                typer.echo(f"           {finding.reason.strip()}".replace("\n", "\n           "))
            if number > SHOWN:
                typer.echo(f"           and {number - SHOWN} more (--json FILE has all)")


def _write_list(path: Path, folder: Path, host_packages: bool, findings: Sequence[Finding], total: int) -> None:
    """Write the sound folders, from where the list lies, so that both can be moved together."""
    from backtalk.run.check import Verdict

    sound = sorted(finding.folder for finding in findings if finding.verdict is Verdict.SOUND)
    option = " --host-packages (host_packages: true of the source)" if host_packages else ""
    lines = [f"# {len(sound)} of {total} tasks of {folder} are sound by: backtalk tasks check{option}"]
    lines += [os.path.relpath(name, path.absolute().parent) for name in sound]
    path.write_text("".join(f"{line}\n" for line in lines))
    typer.echo(f"Written: {path}, {len(sound)} tasks; use it as tasks.source")
