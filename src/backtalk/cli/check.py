"""`backtalk check`: is the gradient of an engine, or of somebody's trainer, the one that the formula gives?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.cli.options import fail, new_console
from backtalk.errors import ConfigError
from backtalk.settings import import_object

if TYPE_CHECKING:
    from backtalk.engines.conformance import TrainerUnderTest

STYLES = {"passed": "green", "failed": "bold red", "cannot": "yellow", "not applicable": "dim"}


def check(
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="torch, trl, skyrl, tinker, foundry, or my_module:MyTrainer for your own (docs/engines.md).",
        ),
    ] = "torch",
) -> None:
    """Compare the gradient of every token of a fixed batch with the formula. Exits with 1 where a check fails."""
    from rich.text import Text

    from backtalk.engines.conformance import Outcome, conformance

    console = new_console()
    counts = dict.fromkeys(Outcome, 0)
    for result in conformance(open_trainer(engine)):
        counts[result.outcome] += 1
        line = Text(f"{result.outcome.value:<16}", style=STYLES[result.outcome.value])
        line += Text(f"{result.check.name:<44}{result.check.claim}", style="default")
        console.print(line, soft_wrap=True)
        if result.reason:
            console.print(Text(f"{'':<16}-> {result.reason}", style="default"), soft_wrap=True)
    summary = ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count)
    console.print(f"\n{engine}: {summary}", markup=False, highlight=False)
    if counts[Outcome.FAILED]:
        fail(f"{engine} fails {counts[Outcome.FAILED]} checks; docs/engines.md says what each means", exit_code=1)


def open_trainer(engine: str) -> Callable[[Path], TrainerUnderTest]:
    """Return the class or function that opens a trainer for the suite, by its name or import path.

    Raises:
        ConfigError: an unknown name, a path to something else, or a host whose packages are not installed.
    """
    if engine == "torch":
        from backtalk.engines.conformance.torch_engine import TorchUnderTest

        return TorchUnderTest
    if engine == "trl":
        from backtalk.hosts.trl.conformance import TrlUnderTest

        return TrlUnderTest
    if engine == "skyrl":
        from backtalk.hosts.skyrl.conformance import SkyRLUnderTest

        return SkyRLUnderTest
    if engine == "tinker":
        from backtalk.engines.tinker.conformance import TinkerUnderTest

        return TinkerUnderTest
    if engine == "foundry":
        from backtalk.engines.foundry.conformance import FoundryUnderTest

        return FoundryUnderTest
    if ":" not in engine:
        raise ConfigError(
            f"--engine {engine} is unknown; use torch, trl, skyrl, tinker, foundry, or my_module:MyTrainer for a "
            "trainer of your own"
        )
    found = import_object(engine, "--engine")
    if not all(callable(getattr(found, name, None)) for name in ("train_step", "own_grpo")):
        raise ConfigError(
            f"--engine {engine} names {found!r}, which is no trainer to test; name a class with the methods train_step "
            "and own_grpo, as docs/engines.md describes them"
        )
    return found
