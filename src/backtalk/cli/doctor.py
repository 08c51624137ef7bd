"""`backtalk doctor`: find out what this machine can do, and what to type to get what is missing.

Every check looks at the real thing: the sandbox check runs a command in a sandbox. A missing part raises nothing; it
becomes a Finding.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backtalk.cli.interrupts import run
from backtalk.cli.options import fail, new_console
from backtalk.errors import BacktalkError, SandboxError
from backtalk.sandboxes.base import SandboxBackend, SandboxLimits

if TYPE_CHECKING:
    from rich.console import Console

# What the extras bring: the import name of the package, and what it is good for.
EXTRAS: dict[str, tuple[str, str]] = {
    "lora": ("peft", "adapters instead of all weights: engine.lora_rank"),
    "sandlock": ("sandlock", "a sandbox where bubblewrap cannot start: Landlock, Linux 6.12"),
    "track": ("trackio", "metrics in a local dashboard: --track trackio"),
    "wandb": ("wandb", "metrics on Weights & Biases: --track wandb"),
    "tensorboard": ("tensorboard", "metrics in event files: --track tensorboard"),
}
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "matplotlib", "rich", "typer")
BASE_MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
MIN_MEMORY_GIB = 2.0
MIN_DISK_GIB = 1.0
DEFAULT_ROLLOUTS = 64  # at once
GIB = 1 << 30
STYLES = {"ok": "green", "note": "yellow", "optional": "dim", "missing": "bold red"}


class State(StrEnum):
    """State of a finding: OK works, NOTE works with less, OPTIONAL is absent and not needed, MISSING stops a run."""

    OK = "ok"
    NOTE = "note"
    OPTIONAL = "optional"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, how it stands, and what to type if it should be better."""

    name: str
    state: State
    text: str
    fix: str | None = None


def doctor(
    conformance: Annotated[
        bool, typer.Option("--conformance", help="Attack the sandbox: over 100 checks, half a minute. Nothing else.")
    ] = False,
) -> None:
    """Print what this machine can do, and what to type for what is missing. Exits with 1 where training cannot run."""
    console = new_console()
    if conformance:
        if failed := print_conformance(console):
            fail(f"the sandbox fails {failed} checks; docs/security.md says what each means", exit_code=1)
        return
    findings: list[Finding] = []
    missing = print_findings((findings.append(finding) or finding for finding in examine()), console)
    if missing:  # with the reasons, since what was printed may have gone elsewhere
        reasons = [f"{f.name}: {f.text}; {f.fix}" for f in findings if f.state is State.MISSING]
        fail(f"a default run cannot work here. {' | '.join(reasons)}", exit_code=1)
    console.print("\nReady. Begin with: backtalk train --preset triage", markup=False, highlight=False)


def examine() -> Iterator[Finding]:
    """Check everything, and yield each finding as soon as it is known."""
    yield _python()
    yield _cores()
    yield _memory()
    yield _disk()
    yield from _packages()
    yield _device()
    yield _base_model()
    yield from _sandbox()
    if sys.platform == "linux":
        yield _capacity()
    yield from _extras()


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", State.OK, text)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{count} usable"
    if sys.platform == "linux":
        from backtalk.sandboxes.machine.capacity import cores

        if (share := cores()) < count:
            return Finding("CPU cores", State.NOTE, f"{text}, and the container may use the time of {share:g} of them")
    return Finding("CPU cores", State.OK, text)


def _memory() -> Finding:
    total = _memory_bytes()
    if total is None:
        return Finding("Memory", State.NOTE, "this system does not say how much it has")
    text = f"{total / GIB:.1f} GiB"
    if total < MIN_MEMORY_GIB * GIB:
        return Finding("Memory", State.NOTE, text, f"the default run wants {MIN_MEMORY_GIB:g} GiB")
    return Finding("Memory", State.OK, text)


def _memory_bytes() -> int | None:
    """Return the memory that this process may use: the machine's, or its control group's limit if that is less."""
    found = []
    with suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if sys.platform == "linux":
        from backtalk.sandboxes.machine.capacity import memory_limits

        found += memory_limits()
    return min(found, default=None)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / GIB:.1f} GiB free in this folder"
    if free < MIN_DISK_GIB * GIB:
        return Finding("Disk", State.NOTE, text, "make room for checkpoints, or pass --out on another disk")
    return Finding("Disk", State.OK, text)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    versions = {package: _version(package) for package in REQUIRED}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        fix = f"{sys.executable} -m pip install {' '.join(missing)}"
        yield Finding("Packages", State.MISSING, "not installed: " + ", ".join(missing), fix)
    present = [f"{package} {version}" for package, version in versions.items() if version is not None]
    if present:
        yield Finding("Packages", State.OK, ", ".join(present))


def _device() -> Finding:
    if find_spec("torch") is None:
        return Finding("Device", State.MISSING, "no PyTorch", f"{sys.executable} -m pip install torch")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(f"{p.name} with {p.total_memory / GIB:.0f} GiB" for p in names)
        more = "; the torch engine uses the first" if len(names) > 1 else ""
        return Finding("Device", State.OK, f"GPU: {text}{more}")
    if shutil.which("nvidia-smi") is not None:
        text = f"this machine has NVIDIA tools, but torch {torch.__version__} sees no GPU; training runs on the CPU"
        return Finding("Device", State.NOTE, text, f"{sys.executable} -m pip install --force-reinstall torch")
    return Finding("Device", State.OK, f"CPU, {torch.get_num_threads()} threads (no NVIDIA GPU)")


def _base_model() -> Finding:
    folder = resources.files("backtalk") / "assets" / "base_model"
    missing = [name for name in BASE_MODEL_FILES if not (folder / name).is_file()]
    if missing:
        text = f"{folder} lacks {', '.join(missing)}"
        return Finding("Base model", State.MISSING, text, "install Backtalk again, or see recipes/base_model")
    size = sum(entry.stat().st_size for entry in Path(str(folder)).iterdir() if entry.is_file())
    return Finding("Base model", State.OK, f"embedded, {size / 1e6:.1f} MB")


def _sandbox() -> Iterator[Finding]:
    from backtalk.sandboxes import ELSEWHERE, NEEDS_LINUX, local_sandbox

    if sys.platform != "linux":
        yield Finding("Sandbox", State.MISSING, f"none on {platform.system()}: {NEEDS_LINUX}", ELSEWHERE)
        return
    try:
        backend = local_sandbox("auto")
        run(_try_sandbox(backend))
    except BacktalkError as error:
        yield Finding("Sandbox", State.MISSING, "none that is safe works here", str(error))
        return
    report = backend.report
    first = report.name == "bubblewrap"
    yield Finding(
        "Sandbox",
        State.OK if first else State.NOTE,
        f"{report.name}; a command ran in it (the first that works of: bubblewrap, sandlock; else none)",
    )
    for title, held in (("isolated", report.isolation), ("limited", report.limits)):
        for name, how in held.items():
            yield Finding("", State.OK, f"{title} {name}: {how}")
    for warning in report.warnings:
        yield Finding("", State.NOTE, warning)
    for check, reason in report.cannot.items():
        yield Finding("", State.NOTE, f"cannot {check}: {reason}")


def _capacity() -> Finding:
    from backtalk.sandboxes.machine.capacity import available_mb, capacity, carried_by_memory, memory_limits

    found, left_mb = capacity(SandboxLimits()), available_mb()
    text = f"{found.sandboxes} at once, with {found.bound}"
    if "memory" not in found.bound:
        text += f"; the {left_mb:.0f} MiB of memory left carry {carried_by_memory(SandboxLimits(), left_mb)}"
    if memory_limits():
        text += f"; memory is that of the control group, {min(memory_limits()) / GIB:.1f} GiB"
    if found.sandboxes >= DEFAULT_ROLLOUTS:
        return Finding("Sandboxes", State.OK, text)
    return Finding("Sandboxes", State.NOTE, f"{text}; the default run wants {DEFAULT_ROLLOUTS} and takes longer")


async def _try_sandbox(backend: SandboxBackend) -> None:
    """Run one command in a sandbox."""
    async with backend.open(SandboxLimits()) as sandbox:
        result = await sandbox.exec("echo hello", timeout_s=10.0)
    if result.exit_code != 0 or result.output.strip() != "hello":
        raise SandboxError(f"'echo hello' in the sandbox ended with {result.exit_code} and said {result.output!r}")


def _extras() -> Iterator[Finding]:
    for extra, (package, use) in EXTRAS.items():
        version = _version(package)
        if version is not None:
            yield Finding(f"Extra {extra}", State.OK, f"{package} {version}, for {use}")
        else:
            fix = f"{sys.executable} -m pip install 'backtalk[{extra}]'"
            yield Finding(f"Extra {extra}", State.OPTIONAL, f"{package} is not installed, for {use}", fix)


def print_findings(findings: Iterable[Finding], console: Console) -> list[str]:
    """Print each finding as it comes; return the names of those that stop a default run."""
    from rich.text import Text

    missing = []
    for finding in findings:
        state = finding.state.value
        line = Text(f"{state:<10}", style=STYLES[state]) + Text(f"{finding.name:<18}{finding.text}", style="default")
        console.print(line, soft_wrap=True)
        if finding.fix is not None:
            console.print(Text(f"{'':<28}-> {finding.fix}", style="default"), soft_wrap=True)
        if finding.state is State.MISSING:
            missing.append(finding.name.strip())
    return missing


def print_conformance(console: Console) -> int:
    """Run the conformance suite on this machine's sandbox and print a line for each check; return how many failed.

    Raises:
        SandboxUnavailable: there is no sandbox to try.
    """
    from rich.text import Text

    from backtalk.sandboxes import local_sandbox
    from backtalk.sandboxes.conformance import Outcome, conformance

    backend = local_sandbox()
    results = run(conformance(backend))
    styles = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.CANNOT: "yellow"}
    styles |= {Outcome.NOT_APPLICABLE: "dim"}
    for result in results:
        line = Text(f"{result.outcome.value:<16}", style=styles[result.outcome])
        line += Text(f"{result.check.category.value:<11}{result.check.name:<32}{result.check.claim}", style="default")
        console.print(line, soft_wrap=True)
        if result.reason:
            console.print(Text(f"{'':<27}-> {result.reason}", style="default"), soft_wrap=True)
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    summary = ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count)
    console.print(f"\n{backend.report.name}: {summary}", markup=False, highlight=False)
    return counts[Outcome.FAILED]
