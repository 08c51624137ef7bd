"""Run `backtalk score`: what checkpoints make of each token of recorded rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.cli.interrupts import run

if TYPE_CHECKING:
    from backtalk.run.score import Scored


def score(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Run folders, or files of trajectories that import reads.")
    ],
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            help="A run folder, or a model by folder or name; may be given many times. Without it, for one run: the "
            "model it began with, and its own checkpoint.",
        ),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option("--step", min=0, help="Steps of a run. Without it: the last.")
    ] = None,
    every_step: Annotated[bool, typer.Option("--all", help="All steps of a run.")] = False,
    alternatives: Annotated[
        int, typer.Option("--top", min=0, help="How many tokens to name where another one came.")
    ] = 5,
) -> None:
    """Score every token of rollouts at one checkpoint or more: its cross-entropy, and what the model expected there.

    `backtalk view` then shows what surprised the policy, and the same text before and after training side by side.
    The scores are written beside the rollouts; what was there before stays, and rollouts may be anybody's.

    Examples: `backtalk score runs/mine`, `backtalk score their.jsonl --checkpoint runs/grpo --checkpoint runs/echo`.
    """
    from backtalk.run.score import score as score_rollouts

    refused: set[str] = set()

    def tell(scored: Scored) -> None:
        ce = "no environment output" if scored.env_ce is None else f"{scored.env_ce:.3f} nats a token"
        typer.echo(
            f"{scored.what}, {scored.checkpoint}: {ce} of environment output ({scored.env_tokens} tokens in "
            f"{scored.rollouts} rollouts)"
        )
        refused.update(scored.refused)

    run(
        score_rollouts(
            paths,
            checkpoints or (),
            steps=steps or (),
            every_step=every_step,
            alternatives=alternatives,
            on_scored=tell,
        )
    )
    for reason in sorted(refused):
        typer.echo(f"Refused: {reason}", err=True)
    if refused:
        raise typer.Exit(1)
