"""`backtalk export`: trajectories as the records of other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backtalk.cli.import_trajectories import Source
from backtalk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from backtalk.language.renderer import Renderer
    from backtalk.trajectory import Trajectory


class Target(StrEnum):
    """What can be written."""

    RFC010 = "rfc010"
    EPISODE_RECORD = "episode-record"
    TRAINING_TRACE = "training-trace"
    ATIF = "atif"


class Learned(StrEnum):
    """RFC 010's world_loss_target: what obs_mask holds."""

    ENV_ONLY = "env_only"
    ALL = "all"


def export(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Trajectories: ours, or any that import reads.")
    ],
    target: Annotated[Target, typer.Option("--format", help="What to write.")],
    out: Annotated[Path, typer.Option(help="Where to write, one record a line: a name that ends in .jsonl.")],
    model: Annotated[str, typer.Option(help="Whose tokens they are: a folder, a Hugging Face name, or base.")] = "base",
    source: Annotated[
        Source | None, typer.Option("--from", help="What wrote the files. Without it: found out by their fields.")
    ] = None,
    learned: Annotated[
        Learned, typer.Option("--target", help="What obs_mask holds: env_only, or all with the harness's warnings.")
    ] = Learned.ENV_ONLY,
) -> None:
    """Write trajectories for others: RFC 010, OpenEnv's EpisodeRecord and TrainingTrace, Harbor's ATIF.

    Token ids, logprobs and roles go along unchanged, and `backtalk import` reads all of it back. Exits with 1 where a
    trajectory cannot be written in that format; the others are.

    Example: `backtalk export captured.jsonl --format episode-record --out results.jsonl`.
    """
    from backtalk.language.renderer import Renderer, RendererConfig
    from backtalk.language.tokenizer import model_location
    from backtalk.run.log import write_bytes
    from backtalk.run.log.sources import read_episodes, rendered

    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; end the name in .jsonl, one record a line")
    renderer = Renderer.from_pretrained(model_location(model), (), RendererConfig(on_drift="fork"))
    read = read_episodes(files, rendered(renderer.for_tools), None if source is None else source.value)
    write = _writer(target, learned, renderer, model)
    lines: list[str] = []
    refused = [f"{refusal.where}: {refusal.reason}" for refusal in read.refusals]
    for trajectory in read.trajectories:
        try:
            lines.append(json.dumps(write(trajectory), allow_nan=False))
        except DataError as error:
            refused.append(str(error))
    for reason in refused:
        typer.echo(f"Refused: {reason}", err=True)
    if not lines:
        raise ConfigError(f"nothing could be exported, so {out} was not written; the reasons stand above")
    write_bytes(out, "".join(f"{line}\n" for line in lines).encode())
    typer.echo(f"Written: {len(lines)} to {out}")
    if refused:
        raise typer.Exit(1)


def _writer(target: Target, learned: Learned, renderer: Renderer, model: str) -> Callable[[Trajectory], dict[str, Any]]:
    match target:
        case Target.RFC010:
            from backtalk.exchange.rfc010 import to_rfc010

            return lambda trajectory: to_rfc010(trajectory, learned.value)
        case Target.EPISODE_RECORD:
            from backtalk.exchange.write.openenv import to_episode_record

            return lambda trajectory: to_episode_record(trajectory, world_loss_target=learned.value)
        case Target.TRAINING_TRACE:
            from backtalk.exchange.write.openenv import to_training_trace

            return lambda trajectory: to_training_trace(trajectory, world_loss_target=learned.value)
        case Target.ATIF:
            from backtalk.exchange.write.atif import to_atif

            return lambda trajectory: to_atif(trajectory, model_name=model)
