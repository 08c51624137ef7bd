"""`backtalk dream`: what a policy expects commands to be answered with, beside what really comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.cli.interrupts import run
from backtalk.cli.options import RunFolder, Settings, new_console
from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from backtalk.language.renderer import Renderer
    from backtalk.run.dream import Dreamed

# Below how many nats a token has a colour, and what the legend says of it.
SURPRISES = ((0.5, "green", "below 0.5"), (2.0, "yellow", "0.5 to 2"), (float("inf"), "red", "above 2"))


def dream(
    folder: RunFolder,
    commands: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Commands, in order.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Then ask for more commands.")] = False,
    task: Annotated[int, typer.Option(min=0, help="Which held-out task is played, from 0.")] = 0,
    step: Annotated[
        int | None, typer.Option(min=0, help="Instead of playing: the turns of a rollout on record, of this step.")
    ] = None,
    group: Annotated[int, typer.Option(min=0, help="With --step: which task of the step, from 0.")] = 0,
    index: Annotated[int, typer.Option(min=0, help="With --step: which rollout of the task, from 0.")] = 0,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="With --step: of the evaluation before it.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Ask the model that the run began with.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Of what it writes; 0: its most probable tokens.")] = 0.0,
    settings: Settings = None,
) -> None:
    """Let the trained policy play the terminal: what it expects, beside what really comes, coloured by its surprise.

    `backtalk dream runs/mine "ls -la" "cat notes.txt"` carries the commands out at a held-out task, and asks the policy
    before each answer; `backtalk dream runs/mine --step 20` does so for a rollout on record. What came of it is kept in
    the run's dreams.jsonl, and `backtalk view` shows it.
    """
    if step is None and not commands and not interactive:
        raise ConfigError("nothing says what to ask; give a COMMAND, --interactive, or --step of a rollout on record")
    if step is not None and (commands or interactive):
        raise ConfigError("--step is about commands on record; leave out the COMMAND and --interactive, or --step")
    console = new_console()
    console.print(_legend())
    overrides = list(settings or [])

    async def show() -> None:
        from backtalk.run.dream import open_dream, open_live, to_record
        from backtalk.run.log import RunLog
        from backtalk.viewer.data import find_rollout

        recorded, log = None, RunLog(folder)
        if step is not None:
            recorded = find_rollout(folder, step=step, group=group, sample=index, evaluation=evaluation).trajectory
        elif log.read_config()["evaluation"]["tasks"] <= task:
            overrides.append(f"evaluation.tasks={task + 1}")
        async with open_dream(folder, base=base, temperature=temperature, overrides=overrides) as opened:
            version = opened.run.engine.policy_version

            def tell(dreamed: Dreamed, renderer: Renderer) -> None:
                console.print(comparison(dreamed, renderer))
                log.write_dream(to_record(dreamed, renderer, step=version))

            if recorded is not None:
                for dreamed in await opened.answers(recorded, opened.run.renderer):
                    tell(dreamed, opened.run.renderer)
                return
            async with open_live(opened, task) as live:
                console.print(live.instruction, markup=False, highlight=False)
                async for command in _commands(commands or [], interactive):
                    dreamed = await live.answer(command)
                    tell(dreamed, live.renderer)
                    if dreamed.done:
                        console.print("the environment has ended the rollout")
                        return

    run(show())


async def _commands(given: list[str], interactive: bool) -> AsyncIterator[str]:
    """Yield the commands that were given, then those that a person types, up to the end of the input."""
    import asyncio

    for command in given:
        yield command
    while interactive:
        try:
            line = await asyncio.to_thread(input, "$ ")
        except EOFError:
            return
        if line.strip():
            yield line


def comparison(dreamed: Dreamed, renderer: Renderer) -> RenderableType:
    """Return a table of what was expected and what came, every token of that coloured by its surprise."""
    from rich.table import Table
    from rich.text import Text

    from backtalk.run.world_model import lines_of
    from backtalk.viewer.data import token_texts, visible

    actual = Text()
    for text, nats in zip(token_texts(renderer.tokenizer, dreamed.actual), dreamed.nats, strict=True):
        actual.append(text, style=next(style for bound, style, _ in SURPRISES if nats < bound))
    table = Table(title=Text(visible(dreamed.command)), title_justify="left", title_style="bold", expand=True)
    table.add_column("expected", ratio=1)
    table.add_column("came", ratio=1)
    table.add_row(Text(visible(dreamed.expected)), actual)
    true, written = lines_of(actual.plain), lines_of(visible(dreamed.expected))
    mean = sum(dreamed.nats) / len(dreamed.nats) if dreamed.nats else 0.0
    right = sum(line in written for line in true)
    table.caption = f"{mean:.2f} nats a token, {right} of {len(true)} lines expected"
    return table


def _legend() -> RenderableType:
    from rich.text import Text

    legend = Text("surprise, nats a token: ")
    for _, style, meaning in SURPRISES:
        legend.append(f" {meaning} ", style=style)
    return legend
