"""Run `backtalk export`: write trajectories as the records of other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from backtalk.errors import ConfigError, DataError
from backtalk.exchange.detect import Format

if TYPE_CHECKING:
    from backtalk.trajectory import Trajectory


Target = Literal["rfc010", "episode-record", "training-trace", "atif"]
LossTarget = Literal["env_only", "all"]  # RFC 010's world_loss_target


def export(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Trajectories: ours, or any that import reads.")
    ],
    target: Annotated[Target, typer.Option("--format", help="What to write.")],
    out: Annotated[Path, typer.Option(help="Where to write, one record a line: a name that ends in .jsonl.")],
    model: Annotated[str, typer.Option(help="Whose tokens they are: a folder, a Hugging Face name, or base.")] = "base",
    source: Annotated[
        Format | None, typer.Option("--from", help="What wrote the files. Without it: found out by their fields.")
    ] = None,
    loss_target: Annotated[
        LossTarget, typer.Option("--target", help="What obs_mask holds: env_only, or all with the harness's warnings.")
    ] = "env_only",
) -> None:
    """Write trajectories for others: RFC 010, OpenEnv's EpisodeRecord and TrainingTrace, Harbor's ATIF.

    Token ids, logprobs and roles go along unchanged, and `backtalk import` reads all of it back. Exits with 1 where a
    trajectory cannot be written in that format; the others are.

    Example: `backtalk export captured.jsonl --format episode-record --out results.jsonl`.
    """
    from backtalk.files import write_bytes
    from backtalk.language.renderer import Renderer, RendererConfig
    from backtalk.language.tokenizer import model_location
    from backtalk.run.log.sources import read_rollouts, record_reader

    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; end the name in .jsonl, one record a line")
    renderer = Renderer.from_pretrained(model_location(model), (), RendererConfig(on_drift="fork"))
    read = read_rollouts(files, record_reader(renderer.for_tools), source)
    write = _writer(target, loss_target, model)
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


def _writer(target: Target, loss_target: LossTarget, model: str) -> Callable[[Trajectory], dict[str, Any]]:
    from backtalk.exchange.rfc010 import to_rfc010
    from backtalk.exchange.write.atif import to_atif
    from backtalk.exchange.write.openenv import to_episode_record, to_training_trace

    if target == "atif":
        return partial(to_atif, model_name=model)
    writers = {"rfc010": to_rfc010, "episode-record": to_episode_record, "training-trace": to_training_trace}
    return partial(writers[target], world_loss_target=loss_target)
