"""`backtalk import`: other libraries' trajectories as ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from backtalk.exchange.read.files import Imported, ImportOptions, RendererOf
    from backtalk.exchange.read.turns import OnDrift
    from backtalk.messages import ToolSpec

SHOWN_REFUSALS = 8


class Source(StrEnum):
    """The formats; the same as backtalk.exchange.read.FORMATS, which is not loaded for --help."""

    CHAT = "chat"
    ATIF = "atif"
    TURNS = "turns"
    TRL = "trl"
    VERIFIERS = "verifiers"
    OPENENV = "openenv"
    RFC010 = "rfc010"


class Given(StrEnum):
    """Roles that imported text may get."""

    CONTEXT = "context"
    ENV_OUTPUT = "env_output"
    WARNING = "warning"


class Drift(StrEnum):
    STOP = "stop"
    FORK = "fork"


class Harness(StrEnum):
    AUTO = "auto"
    TERMINUS = "terminus"
    NONE = "none"


def import_trajectories(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".json, .jsonl, .jsonl.gz or .parquet.")],
    source: Annotated[Source, typer.Option("--format", help="What wrote the files.")],
    out: Annotated[Path, typer.Option(help="Where to write: a name that ends in .parquet or .jsonl.")],
    model: Annotated[
        str | None,
        typer.Option(help="Whose tokenizer and chat template: a folder, a Hugging Face name, or base."),
    ] = None,
    on_drift: Annotated[
        Drift,
        typer.Option(help="A prompt that does not begin with what came before: refuse it, or begin a new branch."),
    ] = Drift.STOP,
    observation_role: Annotated[
        Given | None,
        typer.Option(help="For token ids whose template cannot be told: what a whole observation becomes."),
    ] = None,
    user_role: Annotated[
        Given, typer.Option(help="What a user's message after the first turn is: context, or env_output.")
    ] = Given.CONTEXT,
    harness: Annotated[
        Harness, typer.Option(help="Whose phrases around observations become WARNING; auto goes by the record.")
    ] = Harness.AUTO,
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
    can show to be sampled by the policy is CONTEXT, so it is never trained as an action. Exits with 1 where a record
    was refused; the others are written.

    Example: `backtalk import runs/*.jsonl --format atif --model base --out recorded.parquet`.
    """
    from rich.console import Console

    from backtalk.exchange.read.files import import_files
    from backtalk.run.log import write_trajectories

    if out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out} ends in {out.suffix!r}; end the name in .parquet or .jsonl")
    options = _options(on_drift, observation_role, user_role, harness, warning, keep_reasoning, max_tokens)
    renderer_of, longest = (None, None) if model is None else _model(model, tool_format, options.on_drift)
    imported = import_files(files, source.value, renderer_of, options, longest)
    console = Console()
    if imported.trajectories:
        write_trajectories(out, imported.trajectories)
    _print(imported, options, console)
    if not imported.trajectories:
        raise ConfigError(f"nothing could be imported, so {out} was not written; the reasons stand above")
    typer.echo(f"Written: {out}")
    if imported.refusals:
        raise typer.Exit(1)


def _options(
    on_drift: Drift,
    observation_role: Given | None,
    user_role: Given,
    harness: Harness,
    warning: Sequence[str] | None,
    keep_reasoning: bool,
    max_tokens: int | None,
) -> ImportOptions:
    import re

    from backtalk.exchange.read.files import ImportOptions
    from backtalk.exchange.read.wrappers import NO_WRAPPERS, TERMINUS, Wrappers
    from backtalk.trajectory import TokenRole

    chosen = {Harness.AUTO: None, Harness.TERMINUS: TERMINUS, Harness.NONE: NO_WRAPPERS}[harness]
    if warning:
        for pattern in warning:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"--warning {pattern!r} is no regular expression: {error}") from error
        if chosen is None:
            raise ConfigError("--warning needs to know what it adds to; pass --harness terminus or --harness none too")
        chosen = Wrappers((*chosen.patterns, *warning), chosen.echoes)
    return ImportOptions(
        on_drift="fork" if on_drift is Drift.FORK else "stop",
        observation_role=None if observation_role is None else TokenRole[observation_role.name],
        user_role=TokenRole[user_role.name],
        wrappers=chosen,
        keep_reasoning=keep_reasoning,
        max_tokens=max_tokens,
    )


def _model(model: str, tool_format: str | None, on_drift: OnDrift) -> tuple[RendererOf, int | None]:
    """Renderers of a model's tokenizer, one for each set of tools, and the length of its context if it says so."""
    from backtalk.language.renderer import Renderer, RendererConfig
    from backtalk.language.tokenizer import load_tokenizer, model_location
    from backtalk.language.tool_formats import ToolFormat

    if tool_format is not None and tool_format not in set(ToolFormat):
        raise ConfigError(f"--tool-format {tool_format!r} is unknown; use {', '.join(ToolFormat)}")
    config = RendererConfig(tool_format=None if tool_format is None else ToolFormat(tool_format), on_drift=on_drift)
    location = model_location(model)
    tokenizer = load_tokenizer(location)
    renderers: dict[str, Renderer] = {}

    def renderer_of(tools: Sequence[ToolSpec]) -> Renderer:
        key = json.dumps(
            [[tool.name, tool.description, tool.parameters] for tool in tools], sort_keys=True, default=str
        )
        if key not in renderers:
            renderers[key] = Renderer(tokenizer, tools, config)
        return renderers[key]

    return renderer_of, _context(location)


@cache
def _context(location: str) -> int | None:
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(location), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _print(imported: Imported, options: ImportOptions, console: Console) -> None:
    from rich.table import Table

    rewarded = sum(trajectory.reward is not None for trajectory in imported.trajectories)
    table = Table("imported", "number", show_header=False)
    table.columns[1].justify = "right"
    rows = {"trajectories": len(imported.trajectories), "with a reward": rewarded, "turns": imported.total("num_turns")}
    rows |= {f"{role.name} tokens": count for role, count in imported.tokens().items()}
    for name, number in {**rows, "refused": len(imported.refusals)}.items():
        table.add_row(name, f"{number:,}")
    console.print(table)
    for note in _notes(imported, options):
        console.print(f"- {note}", markup=False, highlight=False)
    if not imported.refusals:
        return
    console.print("\nRefused:", style="red")
    for refusal in imported.refusals[:SHOWN_REFUSALS]:
        console.print(f"- {refusal.where}: {refusal.reason}", markup=False, highlight=False, soft_wrap=True)
    rest = len(imported.refusals) - SHOWN_REFUSALS
    if rest > 0:
        console.print(f"- and {rest} more", markup=False)


def _notes(imported: Imported, options: ImportOptions) -> list[str]:
    """What was decided about the records that a person should know of."""
    total = imported.total
    notes = []
    unsampled = sum(trajectory.num_unsampled_turns for trajectory in imported.trajectories)
    if unsampled:
        notes.append(f"{unsampled:,} turns have no logprobs: unsampled actions, which no policy term trains")
    if total("user_messages") and options.user_role.name == "CONTEXT":
        notes.append(
            f"{total('user_messages'):,} user messages after a first turn are CONTEXT; if the environment speaks "
            "there, pass --user-role env_output"
        )
    if total("dropped_reasonings"):
        notes.append(f"{total('dropped_reasonings'):,} messages lost their reasoning; --keep-reasoning writes it")
    if total("subagents"):
        notes.append(
            f"{total('subagents'):,} trajectories of subagents were left out; import them as records of their own"
        )
    if total("drifts"):
        notes.append(f"{total('drifts'):,} histories had been rewritten; each began a new branch")
    if total("cut_tokens"):
        cut = Counter(trajectory.stats.get("cut_tokens", 0) > 0 for trajectory in imported.trajectories)[True]
        notes.append(f"{total('cut_tokens'):,} tokens of {cut:,} trajectories were cut at a turn's end (--max-tokens)")
    return notes
