"""Run `backtalk import`: turn other libraries' trajectories into ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from backtalk.cli.options import new_console
from backtalk.errors import ConfigError
from backtalk.exchange.detect import Format

if TYPE_CHECKING:
    from rich.console import Console

    from backtalk.exchange.read.files import Imported, RendererOf
    from backtalk.exchange.read.wrappers import Wrappers

SHOWN_REFUSALS = 8

Role = Literal["context", "env_output", "warning"]
UserRole = Literal["auto", "context", "env_output", "warning"]
Drift = Literal["stop", "fork"]
Harness = Literal["auto", "terminus", "mini-swe-agent", "swe-agent", "none"]
USER_ROLE_HELP = (
    "What a user's message after the first turn is; auto: env_output where it always answers an action or reads like "
    "an output, else context."
)

Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help=".json, .jsonl, .traj, .eval, .parquet, or a folder of Harbor's trials."),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Whose tokenizer and chat template: a folder, a Hugging Face name, or base. Without it: base for "
        "messages, none for token ids."
    ),
]
Source = Annotated[
    Format | None, typer.Option("--format", help="What wrote the files. Without it: found out by their fields.")
]
Out = Annotated[Path, typer.Option(help="Where to write: a name that ends in .parquet or .jsonl.")]


def import_trajectories(
    files: Files,
    out: Out = Path("imported.parquet"),
    source: Source = None,
    model: Model = None,
    on_drift: Annotated[
        Drift,
        typer.Option(help="A prompt that does not begin with what came before: refuse it, or begin a new branch."),
    ] = "stop",
    observation_role: Annotated[
        Role | None,
        typer.Option(help="For token ids whose template cannot be told: what a whole observation becomes."),
    ] = None,
    user_role: Annotated[UserRole, typer.Option(help=USER_ROLE_HELP)] = "auto",
    harness: Annotated[
        Harness, typer.Option(help="Whose phrases around observations become WARNING; auto goes by the record.")
    ] = "auto",
    warning: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="More text that is WARNING; may be given many times.")
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option(help="How calls in messages are written, for example hermes. Without it: the model's.")
    ] = None,
    keep_reasoning: Annotated[
        bool, typer.Option("--keep-reasoning", help="Write messages' reasoning too, in think tags.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Keep only whole turns up to so many tokens.")] = None,
) -> None:
    """Turn trajectories of other libraries into ours, with who made each token.

    The file can be `evaluation.recorded_path`: how well a policy foresees what another one was told. Text that nobody
    can show to be sampled by the policy is an unsampled action, which no policy term trains. Exits with 1 where a
    record was refused; the others are written.

    Example: `backtalk import jobs/2026-11-30 --model base --out recorded.parquet`.
    """
    from backtalk.exchange.read.files import import_files
    from backtalk.exchange.read.observations import Observations
    from backtalk.language.tool_formats import ToolFormat
    from backtalk.trajectory import TokenRole

    if out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; end the name in .parquet or .jsonl")
    if tool_format is not None and tool_format not in set(ToolFormat):
        raise ConfigError(f"--tool-format {tool_format!r} is unknown; use {', '.join(ToolFormat)}")
    options = Observations(
        on_drift=on_drift,
        role=None if observation_role is None else TokenRole[observation_role.upper()],
        user_role=None if user_role == "auto" else TokenRole[user_role.upper()],
        wrappers=_wrappers(harness, warning or ()),
        keep_reasoning=keep_reasoning,
        max_tokens=max_tokens,
    )
    renderer_of, longest = (None, None) if model is None else _model(model, tool_format, on_drift)
    # The embedded model's tokenizer is loaded only where there is text to render.
    for_text = (lambda tools: _model("base", tool_format, on_drift)[0](tools)) if model is None else None
    _write(out, import_files(files, source, renderer_of, options, longest, for_text=for_text), user_role)


def _write(out: Path, imported: Imported, user_role: UserRole) -> None:
    """Write the trajectories and print what was imported; exit with 1 where a record was refused."""
    from rich.console import Console

    from backtalk.run.log import write_trajectories

    if imported.trajectories:
        write_trajectories(out, imported.trajectories)
    _print(imported, user_role, new_console())
    _print_refusals(imported, Console(stderr=True))
    if not imported.trajectories:
        raise ConfigError(f"nothing could be imported, so {out} was not written; the reasons stand above")
    typer.echo(f"Written: {out}")
    if imported.refusals:
        raise typer.Exit(1)


def _wrappers(harness: Harness, warnings: Sequence[str]) -> Wrappers | None:
    """Return the phrases of a harness and more of them; None where each record says which harness it was."""
    from backtalk.exchange.read.wrappers import MINI_SWE_AGENT, NO_WRAPPERS, SWE_AGENT, TERMINUS, Wrappers

    for pattern in warnings:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--warning {pattern!r} is no regular expression: {error}") from error
    if harness == "auto":
        if warnings:
            raise ConfigError("--warning needs to know what it adds to; pass --harness terminus or --harness none too")
        return None
    found = {"terminus": TERMINUS, "mini-swe-agent": MINI_SWE_AGENT, "swe-agent": SWE_AGENT}
    known = found.get(harness, NO_WRAPPERS)
    return Wrappers((*known.patterns, *warnings), known.echoes)


@lru_cache
def _model(model: str, tool_format: str | None, on_drift: Drift) -> tuple[RendererOf, int | None]:
    """Return the renderers of a model's tokenizer, by tools, and the length of its context where it is known."""
    from backtalk.language.renderer import Renderer, RendererConfig
    from backtalk.language.tokenizer import load_tokenizer, model_config, model_location
    from backtalk.language.tool_formats import ToolFormat

    config = RendererConfig(tool_format=None if tool_format is None else ToolFormat(tool_format), on_drift=on_drift)
    location = model_location(model)
    tokenizer = load_tokenizer(location)
    for_tools = lru_cache(64)(lambda tools: Renderer(tokenizer, tools, config))
    longest = getattr(model_config(location), "max_position_embeddings", None)
    return lambda tools: for_tools(tuple(tools)), longest if isinstance(longest, int) else None


def _print(imported: Imported, user_role: UserRole, console: Console) -> None:
    from rich.table import Table

    from backtalk.trajectory import TokenRole

    rewarded = sum(trajectory.reward is not None for trajectory in imported.trajectories)
    table = Table("imported", "number", show_header=False)
    table.columns[1].justify = "right"
    rows = {"trajectories": len(imported.trajectories), "with a reward": rewarded, "turns": imported.total("num_turns")}
    rows |= {f"{role.name} tokens": sum(t.count(role) for t in imported.trajectories) for role in TokenRole}
    for name, number in {**rows, "refused": len(imported.refusals)}.items():
        table.add_row(name, f"{number:,}")
    console.print(table)
    for note in _notes(imported, user_role):
        console.print(f"- {note}", markup=False, highlight=False)


def _print_refusals(imported: Imported, console: Console) -> None:
    """Print the reasons where the error is printed, so that they stand above it."""
    if imported.refusals:
        console.print("\nRefused:", style="red")
    for refusal in imported.refusals[:SHOWN_REFUSALS]:
        console.print(f"- {refusal.where}: {refusal.reason}", markup=False, highlight=False, soft_wrap=True)
    rest = len(imported.refusals) - SHOWN_REFUSALS
    if rest > 0:
        console.print(f"- and {rest} more", markup=False)


def _notes(imported: Imported, user_role: UserRole) -> list[str]:
    total = imported.total
    unsampled = sum(trajectory.num_unsampled_turns for trajectory in imported.trajectories)
    cut = sum(trajectory.stats.get("cut_tokens", 0) > 0 for trajectory in imported.trajectories)
    counts = {
        "turns without logprobs (unsampled actions, which no policy term trains)": unsampled,
        "messages that lost their reasoning (--keep-reasoning writes it)": total("dropped_reasonings"),
        "trajectories of subagents left out (import them as records of their own)": total("subagents"),
        "rewritten histories (each began a new branch)": total("drifts"),
        "trajectories cut at a turn's end (--max-tokens)": cut,
        "tokens that were cut": total("cut_tokens"),
    }
    return [*user_notes(imported, user_role), *(f"{note}: {count:,}" for note, count in counts.items() if count)]


def user_notes(imported: Imported, user_role: UserRole) -> list[str]:
    """Return notes on what messages of chat role user after a first turn were taken for."""
    observed, users = imported.total("observed_users"), imported.total("user_messages")
    notes = []
    if observed:
        notes.append(
            "user messages after a first action, taken for ENV_OUTPUT as they answer actions or read like output: "
            f"{observed:,}. If a person wrote them, pass --user-role context"
        )
    if users and user_role in ("auto", "context"):
        notes.append(
            f"user messages after a first turn, taken for CONTEXT: {users:,}. If the environment speaks there, pass "
            "--user-role env_output"
        )
    return notes
