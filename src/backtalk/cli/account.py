"""Run `backtalk account`: count a rollout's tokens by who made them, and by what ordinary RL and ECHO learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backtalk.cli.import_trajectories import USER_ROLE_HELP, Source, UserRole, user_notes
from backtalk.cli.interrupts import run
from backtalk.cli.options import new_console
from backtalk.errors import DataError
from backtalk.exchange.detect import Format

if TYPE_CHECKING:
    from backtalk.evidence.account.losses import Loss
    from backtalk.evidence.account.report import Account
    from backtalk.exchange.read.files import Imported, Rollout
    from backtalk.exchange.read.observations import Observations
    from backtalk.language.renderer import Renderer
    from backtalk.trajectory import Trajectory

CHARACTERS = "characters"


def account(
    files: Annotated[
        list[Path], typer.Argument(metavar="EPISODE...", help="Files of trajectories: ours, or any that import reads.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="What to count in: characters, a folder or a Hugging Face name. Without it: the model's."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Also the losses of this model, from one forward pass: base, a folder or a name.")
    ] = None,
    source: Source = None,
    user_role: Annotated[UserRole, typer.Option(help=USER_ROLE_HELP)] = "auto",
    coeff: Annotated[float, typer.Option(min=0, help="ECHO's world_model_coeff.")] = 0.05,
    advantage: Annotated[
        float | None,
        typer.Option(
            help="Of every rollout. Without it: that of the training step, else by the group, else the reward itself."
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
) -> None:
    """Count a rollout's tokens by who made them, and say how many learnable ones ordinary RL throws away.

    With --model: the loss of GRPO, of ECHO and of the world term alone, and the cross-entropy, from one forward pass.
    Token ids in a file are those of --model, or of base. Exits with 1 where a record was refused.

    Example: `backtalk account episode.json captured.jsonl --tokenizer characters --model base`.
    """
    from rich.text import Text

    from backtalk.cli.account_tables import tables
    from backtalk.evidence.account.report import account_of
    from backtalk.exchange.read.observations import Observations
    from backtalk.trajectory import TokenRole

    unit = tokenizer or model or "base"
    options = Observations(on_drift="fork", user_role=None if user_role == "auto" else TokenRole[user_role.upper()])
    counted = _read(files, source, unit, model or (unit if unit != CHARACTERS else "base"), options)
    accounts = [account_of(trajectory) for trajectory in counted.trajectories]
    scored, step, notes = [], [], []
    if model is not None:
        own = counted if unit == model else _read(files, source, model, model, options)
        advantages, notes = _advantages(files, own, advantage)
        scored, step = _score(own.trajectories, model, coeff, advantages)
    console = new_console()
    for part in tables(accounts, unit, scored, step, model, coeff):
        console.print(part, soft_wrap=isinstance(part, Text))
        console.print()
    refused = [f"refused: {refusal.where}: {refusal.reason}" for refusal in counted.refusals]
    for note in [*notes, *user_notes(counted, user_role), *refused]:
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        from backtalk.files import write_bytes

        write_bytes(json_path, json.dumps(_json(unit, coeff, accounts, scored, step), indent=1).encode())
    if counted.refusals:
        raise typer.Exit(1)


def _renderer(name: str) -> Renderer:
    from backtalk.language.renderer import Renderer, RendererConfig
    from backtalk.language.tokenizer import model_location

    return Renderer.from_pretrained(model_location(name), (), RendererConfig(on_drift="fork"))


def _read(files: Sequence[Path], source: Format | None, unit: str, model: str, options: Observations) -> Imported:
    """Return the rollouts in tokens of ``unit``. Token ids in the files are those of ``model``."""
    from backtalk.evidence.account.characters import characters, recounted, transcribed
    from backtalk.run.log.sources import read_rollouts, record_reader

    origin = _renderer(model)
    target = None if unit == CHARACTERS else origin if unit == model else _renderer(unit)
    size = origin.encoder.backend.get_vocab_size(with_added_tokens=True)

    def encode(text: str) -> Sequence[int]:
        if target is None:
            return characters(text)
        return target.encoder.backend.encode(text, add_special_tokens=False).ids

    def read(rollout: Rollout) -> Trajectory:
        written = None if rollout.source is None else transcribed(rollout.record, rollout.source, rollout.file, options)
        if written is not None:
            return written if target is None else record_reader(target.for_tools, options)(rollout)
        found = record_reader(origin.for_tools, options)(rollout)
        if (largest := max(found.token_ids, default=0)) >= size:
            raise DataError(
                f"token id {largest} is none of the {size} of {model}; pass the --model that these tokens are of"
            )
        return found if target is origin else recounted(found, origin.encoder.decode, encode)

    found = read_rollouts(files, read, source)
    if not found.trajectories:
        reasons = "; ".join(f"{refusal.where}: {refusal.reason}" for refusal in found.refusals)
        raise DataError(f"there is no rollout to account for. {reasons or 'The files are empty'}")
    return found


def _advantages(
    files: Sequence[Path], episodes: Imported, advantage: float | None
) -> tuple[list[float | None], list[str]]:
    """Return each rollout's advantage, and notes: as asked for, as a run was trained with, or by the group."""
    from backtalk.evidence.account.losses import advantages_of
    from backtalk.run.log import RunLog

    if advantage is not None:
        return [advantage] * len(episodes.trajectories), []
    steps = [RunLog.of_groups(file) for file in files]
    trained = [found[0].read_weights(found[1], found[0].read_groups(found[1])) for found in steps if found]
    if len(trained) == len(files) and None not in trained and not episodes.refusals:
        rows = [row for groups in trained for group in groups or () for row in group]
        return [row.advantage for row in rows], ["the advantages are those that the run was trained with"]
    note = "advantages are worked out from the rewards, without penalties: no training step has left weights on record"
    return advantages_of(episodes.trajectories), [note] if any(steps) else []


def _score(
    trajectories: Sequence[Trajectory], model: str, coeff: float, advantages: Sequence[float | None]
) -> tuple[list[Account], list[Loss]]:
    """Return each rollout's account with losses, and the losses of one step over all, from one forward pass.

    Log-probabilities are of temperature 1, in nats.
    """
    from backtalk.engines.torch.config import TorchConfig
    from backtalk.engines.torch.engine import TorchEngine
    from backtalk.evidence.account.losses import three_losses
    from backtalk.evidence.account.report import account_of

    engine = TorchEngine(TorchConfig(model=model))
    longest = getattr(engine.model.config, "max_position_embeddings", None)
    for trajectory in trajectories:
        length = max(sum(map(len, branch)) for branch in trajectory.branches)
        if longest is not None and length > longest:
            raise DataError(
                f"{trajectory.task_id} has {length} tokens and the context of {model} holds {longest}; pass a model "
                "with a longer context, or leave --model out"
            )
    logprobs = run(engine.score(list(trajectories)))
    accounts = [
        account_of(trajectory, scores, advantage=advantage, world_model_coeff=coeff)
        for trajectory, scores, advantage in zip(trajectories, logprobs, advantages, strict=True)
    ]
    return accounts, three_losses(trajectories, logprobs, advantages, world_model_coeff=coeff)


def _json(
    unit: str, coeff: float, accounts: Sequence[Account], scored: Sequence[Account], step: Sequence[Loss]
) -> dict[str, Any]:
    from backtalk.evidence.account.report import total_of

    found: dict[str, Any] = {"tokenizer": unit, "total": total_of(accounts).to_dict()}
    found["episodes"] = [account.to_dict() for account in accounts]
    if scored:
        found["world_model_coeff"] = coeff
        found["losses"] = {loss.name: asdict(loss) for loss in step}
        found["scored"] = [account.to_dict() for account in scored]
    return found
