"""Run `backtalk capture`: record rollouts of a script, a person, or a model behind an API."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backtalk.cli.interrupts import run
from backtalk.cli.options import HostPackages, new_console
from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from backtalk.capture.rollout import Author
    from backtalk.messages import Message
    from backtalk.run.config import TrainConfig
    from backtalk.run.worlds import Worlds
    from backtalk.tasks.task import Task
    from backtalk.trajectory import Trajectory

Keep = Callable[["Trajectory"], None]  # is handed each rollout as it ends
OPTIONS = "options."  # settings of the world itself begin so
PERSON_TURNS, PERSON_TIMEOUT_S = 200, 86_400.0
ALL_TASKS = 1_000_000  # more than a world brings


def capture(
    world: Annotated[str, typer.Argument(metavar="WORLD", help="terminal, openenv:WHERE, awm:WHICH or MODULE:WORLD.")],
    out: Annotated[Path, typer.Option(help="Where to write: a new file that ends in .parquet or .jsonl.")],
    task: Annotated[
        str | None,
        typer.Option(help="In a terminal: workbench/NAME, triage, or a task folder. Else an id; or one is drawn."),
    ] = None,
    host_packages: HostPackages = False,
    script: Annotated[Path | None, typer.Option(help="Play this file: one action a line.")] = None,
    human: Annotated[bool, typer.Option("--human", help="Play yourself, at the prompt; Ctrl-D leaves.")] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Let a model play: an OpenAI-compatible API, as in http://HOST/v1."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Ask the endpoint with token ids, so that actions can be trained (vLLM).")
    ] = False,
    tokenizer: Annotated[
        str, typer.Option(help="Whose tokens to write: base, a folder or a Hugging Face name.")
    ] = "base",
    episodes: Annotated[int, typer.Option(min=1, help="How many, one after the other.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Of the endpoint's model.")] = 1.0,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Where a rollout ends at the latest.")] = None,
    seed: Annotated[int, typer.Option(help="Of tasks that are drawn: triage, and an OpenEnv environment's.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of a run, or options.KEY of the world's own."),
    ] = None,
) -> None:
    """Record real rollouts as trajectories with who made each token, with the code that training uses.

    An action is kept as one that can be trained only where a server says which ids it sampled, with which logprobs,
    from just our tokens. All others have no logprobs; what the world said is learned from all the same.

    Examples: `backtalk capture terminal --task workbench/rota-bug --human --out mine.jsonl`,
    `backtalk capture awm:shop --script buy.txt --out shop.jsonl`,
    `backtalk capture terminal --task triage --endpoint http://127.0.0.1:8000/v1 --model Qwen/Qwen3-0.6B --out q.jsonl`.
    """
    from backtalk.capture.people import read_script
    from backtalk.run.log import lock_file

    if sum((script is not None, human, endpoint is not None)) != 1:
        raise ConfigError("nothing says who plays; give one of --script FILE, --human and --endpoint URL")
    _refuse_unless_new(out)
    console = new_console()
    lines = [] if script is None else read_script(script)
    authors = _authors(lines, endpoint, model, tokens, temperature, console)
    config = _config(world, _source(world, task), list(settings or []), max_turns, len(lines), human, host_packages)
    play = partial(_play, world, task, seed, authors, config, tokenizer, episodes)
    with lock_file(out):
        _refuse_unless_new(out)  # again, as it may have been written meanwhile
        failed = _record(out, episodes, console, play)
    if failed:
        raise typer.Exit(1)


def _record(out: Path, episodes: int, console: Console, play: Callable[[Keep], Coroutine[Any, Any, None]]) -> bool:
    """Write each rollout when it ends, and say how many there are, however it all ends; return whether one failed."""
    from backtalk.run.log import append_trajectory

    failed: list[bool] = []

    def keep(trajectory: Trajectory) -> None:
        append_trajectory(out, trajectory)
        failed.append(trajectory.failure is not None)
        _say(console, _summary(trajectory))

    try:
        run(play(keep))
    finally:
        if failed:
            _say(console, f"Written: {len(failed)} of {episodes} rollouts to {out}")
    return any(failed)


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _refuse_unless_new(out: Path) -> None:
    if out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; end the name in .parquet or .jsonl")
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another name")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {out} cannot be written: {folder} is no folder that you may write to")


def _authors(
    lines: Sequence[str],
    endpoint: str | None,
    model: str | None,
    tokens: bool,
    temperature: float,
    console: Console,
) -> Callable[[], Author]:
    from backtalk.capture.endpoint import Endpoint, EndpointConfig
    from backtalk.capture.people import Person, Script

    if endpoint is None:
        if model is not None or tokens:
            raise ConfigError("--model and --tokens say how an endpoint is asked; give --endpoint URL with them")
        warn = partial(_say, console, style="red")
        return lambda: Script(lines) if lines else Person(lambda: input("> "), partial(_show, console), warn)
    if model is None:
        raise ConfigError(f"--endpoint {endpoint} needs the name of a model there; give --model NAME")
    config = EndpointConfig(url=endpoint, model=model, tokens=tokens, temperature=temperature)
    return lambda: Endpoint(config)


def _show(console: Console, message: Message) -> None:
    """Print a message, the harness's part of it in yellow; nothing in it can steer the terminal."""
    from rich.text import Text

    from backtalk.trajectory import TokenRole
    from backtalk.viewer.data import visible

    text = Text(overflow="fold")
    for part in message.parts:
        text.append(visible(part.text), style="yellow" if part.role is TokenRole.WARNING else "")
    console.print(text, highlight=False)


def _config(
    world: str,
    source: str,
    overrides: Sequence[str],
    max_turns: int | None,
    script_lines: int,
    human: bool,
    host_packages: bool = False,
) -> TrainConfig:
    from backtalk.run.config import config_from_dict
    from backtalk.run.settings_file import parse_overrides, set_dotted

    tree: dict[str, Any] = {}
    if script_lines:
        set_dotted(tree, "rollout.max_turns", script_lines)
    elif human:  # people need their time
        tree["rollout"] = {"max_turns": PERSON_TURNS, "rollout_timeout_s": PERSON_TIMEOUT_S}
    options: dict[str, Any] = {}
    for key, value in parse_overrides(overrides).items():
        inside = key.startswith(OPTIONS)
        set_dotted(options if inside else tree, key.removeprefix(OPTIONS), value)
    if max_turns is not None:
        set_dotted(tree, "rollout.max_turns", max_turns)
    if world == "terminal" and options:
        raise ConfigError(f"{OPTIONS}{next(iter(options))} is of no terminal; its settings are terminal.KEY")
    given = {"host_packages": True} if host_packages else {}
    tree["tasks"] = {**tree.get("tasks", {}), "source": [{"name": source, "options": options} | given]}
    return config_from_dict(tree)


def _source(world: str, task: str | None) -> str:
    """Return the task source that the world and the task's name stand for, as ``tasks.source`` has it."""
    if ":" in world:
        return world
    if world != "terminal":
        raise ConfigError(f"no world is called {world!r}; use terminal, openenv:WHERE, awm:WHICH or MODULE:WORLD")
    if task is None:
        raise ConfigError("nothing says what to do in the terminal; give --task workbench/NAME, triage or a folder")
    dataset, _, inside = task.partition("/")
    folder = resources.files("backtalk").joinpath("assets/tasks", dataset, inside)
    return str(folder) if inside and folder.is_dir() else task


def _find_task(worlds: Worlds, world: str, name: str | None, seed: int) -> Task:
    """Return the task to play: the one of that id, or one of the train split, drawn by ``seed``."""
    from backtalk.tasks.task import Split

    drawn = name == "triage" if world == "terminal" else name is None
    splits, count = ([Split.TRAIN], 1) if drawn else (list(Split), ALL_TASKS)
    tasks = [task for split in splits for task in worlds.tasks(split, count, seed)[0]]
    ids = [task.id for task in tasks]
    if world == "terminal" and len(tasks) > 1:
        raise ConfigError(f"{name} holds {len(tasks)} tasks; name one of them: {_some(ids)}")
    if world != "terminal" and name is not None:
        tasks = [task for task in tasks if task.id == name]
    if not tasks:
        raise ConfigError(f"{world} has no task {name!r}; it has {_some(ids)}")
    return tasks[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


async def _play(
    world: str,
    name: str | None,
    seed: int,
    authors: Callable[[], Author],
    config: TrainConfig,
    tokenizer: str,
    episodes: int,
    keep: Keep,
) -> None:
    from backtalk.capture.rollout import capture_episode
    from backtalk.language.renderer import Renderer
    from backtalk.language.tokenizer import model_location
    from backtalk.run.worlds import open_worlds

    renderer = Renderer.from_pretrained(model_location(tokenizer), (), config.renderer)
    async with open_worlds(config) as worlds:
        task = _find_task(worlds, world, name, seed)
        if config.rollout.rollout_timeout_s == PERSON_TIMEOUT_S:  # a task's own limit is a machine's
            task = replace(task, agent_timeout_s=PERSON_TIMEOUT_S)
        for index in range(episodes):
            keep(await capture_episode(task, worlds.open, authors(), renderer, config.rollout, sample_index=index))


def _summary(trajectory: Trajectory) -> str:
    from backtalk.trajectory import TokenRole

    turns, unsampled, failure = trajectory.num_turns, trajectory.num_unsampled_turns, trajectory.failure
    ending = trajectory.stop_reason.value
    if failure is not None:
        ending = f"failed at {failure.phase}: {failure.error}: {failure.message}"
    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:g}"
    sampled = "none sampled" if unsampled == turns else "all sampled" if not unsampled else f"{unsampled} not sampled"
    unclean = int(trajectory.stats.get("unclean_turns", 0))
    sampled += f", {unclean} with a fault that was told" if unclean else ""
    counts = ", ".join(f"{role.name} {trajectory.count(role):,}" for role in TokenRole if trajectory.count(role))
    return f"{trajectory.task_id}: {turns} turns ({sampled}), {reward}, {ending}; {counts} tokens"
