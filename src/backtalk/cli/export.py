"""Run `backtalk export`: write trajectories as the records of other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from backtalk.cli.options import Settings
from backtalk.errors import ConfigError, DataError
from backtalk.exchange.detect import Format

if TYPE_CHECKING:
    from backtalk.objective.config import ObjectiveConfig
    from backtalk.trajectory import Trajectory


Target = Literal["rfc010", "episode-record", "training-trace", "atif", "inspect", "trackio", "prime-rl", "verl"]
SUFFIXES = {
    "prime-rl": (".toml", "as TOML"),
    "inspect": (".json", "as one log"),
    "trackio": (".db", "the database of a project"),
}
LossTarget = Literal["env_only", "all"]  # RFC 010's world_loss_target


def export(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Trajectories: ours, any that import reads, or run folders.")
    ],
    target: Annotated[Target, typer.Option("--format", help="What to write.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Where to write: a name in .jsonl, one record a line; inspect: .json, trackio: .db, prime-rl: .toml."
        ),
    ],
    model: Annotated[str, typer.Option(help="Whose tokens they are: a folder, a Hugging Face name, or base.")] = "base",
    source: Annotated[
        Format | None, typer.Option("--from", help="What wrote the files. Without it: found out by their fields.")
    ] = None,
    loss_target: Annotated[
        LossTarget, typer.Option("--target", help="What obs_mask holds: env_only, or all with the harness's warnings.")
    ] = "env_only",
    settings: Settings = None,
) -> None:
    """Write trajectories for others: RFC 010, OpenEnv's EpisodeRecord and TrainingTrace, Harbor's ATIF, verl's rows.

    Token ids, logprobs and roles go along unchanged, and `backtalk import` reads all but verl's back. Exits with 1
    where a trajectory cannot be written in that format; the others are.

    `--format inspect` writes one log that `inspect view` opens: messages, rewards as scores, limits and errors.
    `--format trackio --out FOLDER/PROJECT.db` logs traces that `TRACKIO_DIR=FOLDER trackio show` shows.

    `--format prime-rl` (a .toml) and verl translate the coefficient of the world-model term, measured on these
    rollouts. The objective is that of the run folder, or the default, with what --set says.

    Example: `backtalk export runs/mine --format prime-rl --out algo.toml`.
    """
    from backtalk.language.renderer import Renderer, RendererConfig
    from backtalk.language.tokenizer import model_location
    from backtalk.run.log.sources import read_rollouts, record_reader

    suffix, what = SUFFIXES.get(target, (".jsonl", "one record a line"))
    if out.suffix != suffix:
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; end the name in {suffix}, {what}")
    objective = _objective(files, target, list(settings or []))
    renderer = Renderer.from_pretrained(model_location(model), (), RendererConfig(on_drift="fork"))
    read = read_rollouts(
        [path for file in files for path in _rollouts_of(file)], record_reader(renderer.for_tools), source
    )
    refused = [f"{refusal.where}: {refusal.reason}" for refusal in read.refusals]
    name = files[0].resolve().stem
    text, notes = _write(read.trajectories, target, loss_target, model, objective, refused, name)
    for reason in refused:
        typer.echo(f"Refused: {reason}", err=True)
    if not text:
        raise ConfigError(f"nothing could be exported, so {out} was not written; the reasons stand above")
    _save(out, target, text, name)
    typer.echo("\n".join([f"Written: {len(read.trajectories) - len(refused) + len(read.refusals)} to {out}", *notes]))
    if refused:
        raise typer.Exit(1)


def _save(out: Path, target: Target, text: str, name: str) -> None:
    """Write the text into a file, or log its traces."""
    from backtalk.files import write_bytes

    if target == "trackio":
        from backtalk.exchange.write.trackio_traces import log_traces

        log_traces(out, [json.loads(line) for line in text.splitlines()], run=name)
    else:
        write_bytes(out, text.encode())


def _rollouts_of(path: Path) -> list[Path]:
    """Return the files with a run folder's rollouts, of training; or the file itself."""
    return sorted(path.glob("groups/step_*.parquet")) if path.is_dir() else [path]


def _objective(files: Sequence[Path], target: Target, overrides: list[str]) -> ObjectiveConfig | None:
    """Return the objective of the first run folder, or the default, for a format that needs one."""
    from backtalk.run.config import config_from_dict
    from backtalk.run.log import RunLog

    if target not in ("prime-rl", "verl"):
        if overrides:
            raise ConfigError(f"--format {target} holds trajectories and no settings; leave --set out")
        return None
    folder = next((path for path in files if path.is_dir()), None)
    return config_from_dict({} if folder is None else RunLog(folder).read_config(), overrides).objective


def _write(
    trajectories: Sequence[Trajectory],
    target: Target,
    loss_target: LossTarget,
    model: str,
    objective: ObjectiveConfig | None,
    refused: list[str],
    name: str,
) -> tuple[str, list[str]]:
    """Return the text of the file, and lines to tell; add to ``refused`` what cannot be written."""
    if target == "inspect" and trajectories:
        from backtalk.exchange.write.inspect_ai import to_inspect

        return json.dumps(to_inspect(trajectories, task=name, model_name=model), allow_nan=False), []
    if objective is not None and target == "prime-rl" and trajectories:
        from backtalk.exchange.write.trainers import to_prime_rl

        return to_prime_rl(trajectories, objective), []
    notes: list[str] = []
    if objective is not None and trajectories:
        from backtalk.exchange.write.trainers import verl_settings

        notes = ["Settings of the recipe:", *verl_settings(trajectories, objective)]
    write, lines = _writer(target, loss_target, model, objective), list[str]()
    for trajectory in trajectories:
        try:
            lines += [json.dumps(record, allow_nan=False) for record in write(trajectory)]
        except DataError as error:
            refused.append(str(error))
    return "".join(f"{line}\n" for line in lines), notes


def _writer(
    target: Target, loss_target: LossTarget, model: str, objective: ObjectiveConfig | None
) -> Callable[[Trajectory], list[dict[str, Any]]]:
    """Return a function from a trajectory to its records."""
    from backtalk.exchange.rfc010 import to_rfc010
    from backtalk.exchange.write.atif import to_atif
    from backtalk.exchange.write.openenv import to_episode_record, to_training_trace
    from backtalk.exchange.write.trainers import to_verl

    if objective is not None:
        return partial(to_verl, target=objective.world_loss_target)
    if target == "trackio":
        from backtalk.exchange.write.trackio_traces import to_trace

        return lambda trajectory: [to_trace(trajectory, model_name=model)]
    if target == "atif":
        return lambda trajectory: [to_atif(trajectory, model_name=model)]
    writers = {"rfc010": to_rfc010, "episode-record": to_episode_record, "training-trace": to_training_trace}
    return lambda trajectory: [writers[target](trajectory, world_loss_target=loss_target)]
