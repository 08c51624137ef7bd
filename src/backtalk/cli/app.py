"""The command line. Heavy parts are imported inside the command that needs them, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from backtalk import __version__
from backtalk.cli.account import account
from backtalk.cli.capture import capture
from backtalk.cli.evaluate import evaluate
from backtalk.cli.export import export
from backtalk.cli.import_trajectories import import_trajectories
from backtalk.cli.interrupts import Interrupted, disk_is_full, run
from backtalk.cli.serve import serve
from backtalk.cli.settings import settings as list_settings
from backtalk.errors import BacktalkError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from backtalk.run.config import TrainConfig
    from backtalk.run.events import Event, OnEvent
    from backtalk.trajectory import TrajectoryGroup

app = typer.Typer(
    name="backtalk",
    help=(
        "Train an agent in a real shell, from its rewards and from what the shell says back.\n\n"
        "Begin with `backtalk doctor`, which says what this machine can do, then "
        "`backtalk train --preset triage`."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tasks_app = typer.Typer(help="Tasks as files.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(tasks_app, name="tasks")
app.command("import")(import_trajectories)
app.command()(evaluate)
app.command()(capture)
app.command()(account)
app.command()(export)
app.command()(serve)
app.command("settings")(list_settings)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `backtalk train` made it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be given many times."),
]


def main() -> None:
    """Entry point of the `backtalk` command: mistakes become messages; bugs, and all with `--debug`, tracebacks."""
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


def explain(error: BaseException) -> str | None:
    """What to tell a person about an error, or None where it is a bug and the traceback is what helps."""
    if isinstance(error, BaseExceptionGroup):
        messages = [explain(one) for one in error.exceptions]
        return None if None in messages else "; ".join(dict.fromkeys(m for m in messages if m))
    if isinstance(error, BacktalkError):
        return str(error)
    if disk_is_full(error):
        return (
            f"the disk is full ({error}). What was written before is whole; make room, then continue a training "
            "with: backtalk train --out RUN --resume"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}; check the path, and whether you may read and write there"
    return None


def fail(message: str, *, exit_code: int = 2) -> NoReturn:
    """Say on stderr what is wrong, in red where that is a terminal, and leave."""
    typer.secho(f"Error: {message}", fg="red", err=True)
    sys.exit(exit_code)


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
    """Options of every command; `main` takes --debug out before this is reached."""


@app.command()
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
) -> None:
    """Train a policy, and measure it on held-out tasks before and after.

    The run folder gets the resolved settings, metrics.jsonl, every trajectory, a checkpoint, report.html and curves.

    Examples: `backtalk train --preset triage`,
    `backtalk train my.yaml --model Qwen/Qwen3-0.6B --set steps=100 --out runs/qwen`,
    `backtalk train --out runs/qwen --resume`.
    """
    overrides = list(settings or []) + ([f"engine.model={model}"] if model else [])
    overrides += [f"tasks.source=openenv:{openenv}"] if openenv else []
    resolved = _resolve(config, preset, overrides, out, resume)
    from backtalk.cli.progress import RunDisplay
    from backtalk.run.config import config_to_dict
    from backtalk.run.track import tracking
    from backtalk.run.train import train as run_training

    folder = out or _new_folder(preset or Path(config or "run").stem)
    with ExitStack() as stack:
        listeners: list[OnEvent] = [stack.enter_context(RunDisplay(_console())).show]
        if track is not None:
            listeners.append(stack.enter_context(tracking(track, folder, config_to_dict(resolved))))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        try:
            run(run_training(resolved, folder, resume=resume, on_event=tell))
        except Interrupted:
            stack.close()
            if (folder / "config.yaml").exists():
                typer.echo(f"Stopped. Continue with: backtalk train --out {folder} --resume", err=True)
            raise
    _write_report(folder)


def _resolve(
    config: str | None, preset: str | None, overrides: list[str], out: Path | None, resume: bool
) -> TrainConfig:
    """The settings that a training was asked for; where nothing names them, those of the run being resumed."""
    if config and preset:
        raise ConfigError(f"got both {config!r} and --preset {preset!r}; give one, and change settings with --set")
    if resume and out is None:
        raise ConfigError("--resume needs to know which run; type `backtalk train --out RUN --resume`")
    source = preset or config
    if source is None and not resume:
        raise ConfigError("nothing says what to train; type `backtalk train --preset triage`, or name a CONFIG.yaml")
    from backtalk.run.config import config_from_dict, load_config
    from backtalk.run.log import RunLog

    if source is not None or out is None:
        return load_config(str(source), overrides)
    return config_from_dict(RunLog(out).read_config(), overrides)


def _new_folder(name: str) -> Path:
    """The first of runs/name, runs/name-2, ... that does not exist."""
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


@app.command()
def show(
    folder: RunFolder,
    step: Annotated[int | None, typer.Option(min=0, help="Training step, from 0. Without it: the last.")] = None,
    task: Annotated[str | None, typer.Option(help="Id of the task, instead of --group.")] = None,
    group: Annotated[int, typer.Option(min=0, help="Which task of the step, from 0.")] = 0,
    index: Annotated[int, typer.Option(min=0, help="Which attempt (sample) at the task, from 0.")] = 0,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="The held-out measurement before that step instead of the step.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the tasks of the step and their rewards.")] = False,
) -> None:
    """Show one attempt, every token coloured by who made it, with the weight it was trained at."""
    from backtalk.viewer.terminal import list_groups
    from backtalk.viewer.terminal import show as show_trajectory

    if listing or task is not None:
        groups = _groups_of(folder, step, evaluation)
        if listing:
            _console().print(list_groups(groups))
            return
        ids = [one.task_id for one in groups]
        if task not in ids:
            raise ConfigError(f"no task {task!r} in that step; it has {', '.join(ids)}")
        group = ids.index(task)
    show_trajectory(folder, _console(), step=step, group=group, sample=index, evaluation=evaluation)


def _groups_of(folder: Path, step: int | None, evaluation: bool) -> Sequence[TrajectoryGroup]:
    from backtalk.run.log import RunLog

    log = RunLog(folder)
    log.read_config()  # says so where this is no run
    steps = log.evaluation_steps() if evaluation else log.group_steps()
    if not steps:
        raise ConfigError(f"{folder} has nothing to show yet; wait for the first step")
    step = steps[-1] if step is None else step
    return log.read_evaluation_groups(step) if evaluation else log.read_groups(step)


@app.command()
def report(folder: RunFolder) -> None:
    """Write report.html and the curves of a run again, or those of a study."""
    _write_report(folder)


def _write_report(folder: Path) -> None:
    if (folder / "study.json").exists():
        from backtalk.viewer.web.study import write_study_report as write
    else:
        from backtalk.viewer.web.report import write_report as write

    typer.echo(f"Report: {write(folder)}")


@app.command()
def study(
    source: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, for example demo, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the study. Without it: a new one in runs/.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Without it: one a core.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds instead of the study's own.")] = None,
    settings: Settings = None,
) -> None:
    """Train several arms, each with several seeds, and compare them: a table with intervals, and a picture.

    `backtalk study demo` trains GRPO and GRPO+ECHO side by side, in minutes on two cores.
    """
    from backtalk.evidence.study import load_study, run_study

    plan = load_study(source, seeds=seeds, overrides=list(settings or []))
    from backtalk.cli.progress import StudyDisplay, comparison_table

    folder = out or _new_folder(plan.name)
    console = _console()
    try:
        with StudyDisplay(console) as display:
            comparison = run(run_study(plan, folder, parallel=parallel, on_event=display.show))
    except Interrupted:
        typer.echo(f"Stopped. Continue with: backtalk study {source} --out {folder}", err=True)
        raise
    console.print(comparison_table(comparison))
    _write_report(folder)
    typer.echo(f"Picture: {folder / 'study.png'}")


@app.command()
def doctor(
    conformance: Annotated[
        bool, typer.Option("--conformance", help="Attack the sandbox: over 100 checks, half a minute. Nothing else.")
    ] = False,
) -> None:
    """Say what this machine can do, and what to type for what is missing. Exits with 1 where training cannot run."""
    from backtalk.cli.doctor import examine, print_conformance, print_findings

    console = _console()
    if conformance:
        if failed := print_conformance(console):
            fail(f"the sandbox fails {failed} checks; docs/security.md says what each means", exit_code=1)
        return
    missing = print_findings(examine(), console)
    if missing:
        fail(f"a default run cannot work here: {', '.join(missing)}. What to do stands above", exit_code=1)
    console.print("\nReady. Begin with: backtalk train --preset triage", markup=False, highlight=False)


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


def _console() -> Console:
    from rich.console import Console

    return Console()
