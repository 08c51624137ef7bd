"""The parts of a check: the sandbox it is tried in, its result, and assertions that say what was found."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from backtalk.sandboxes.base import BackendReport, ExecResult, Sandbox, SandboxBackend, SandboxFile, SandboxLimits

LIMITS = SandboxLimits(memory_mb=96, processes=24, disk_mb=16)
COMMAND_TIMEOUT_S = 20.0  # for a command that ends by itself; a loaded machine takes its time


class Failure(Exception):
    """A check found what should not be."""


class NotApplicable(Exception):
    """A check cannot be tried here; the message says why."""


class Category(StrEnum):
    """The kind of a check.

    BEHAVIOUR: what every environment relies on. LIMIT: what one sandbox may use. ATTACK: what an agent might try
    against the machine, the trainer, other rollouts or the verifier. HYGIENE: what is left when a sandbox is closed.
    """

    BEHAVIOUR = "behaviour"
    LIMIT = "limit"
    ATTACK = "attack"
    HYGIENE = "hygiene"


class SandboxUnderTest:
    """A fresh sandbox of the backend under test, with short methods for what checks do in it."""

    def __init__(self, sandbox: Sandbox, backend: SandboxBackend) -> None:
        self.inner, self.backend = sandbox, backend
        self.get, self.restart = sandbox.get, sandbox.restart

    async def exec(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S, **options: Any) -> ExecResult:
        """Run a command and return its result; the options are those of `Sandbox.exec`."""
        return await self.inner.exec(command, timeout_s=timeout_s, **options)

    async def output(self, command: str) -> str:
        """Run a command and return what it printed."""
        return (await self.exec(command)).output

    async def exit_code(self, command: str) -> int:
        """Run a command, drop what it prints, and return its exit code."""
        return (await self.exec(f"{{ {command}\n}} >/dev/null 2>&1")).exit_code

    async def python(self, program: str) -> str:
        """Run a Python program inside and return what it printed.

        Raises:
            NotApplicable: there is no python3 inside.
        """
        if await self.exit_code("command -v python3") != 0:
            raise NotApplicable("no python3 inside to try it with")
        return await self.output(f"python3 -c {shlex.quote(program)}")

    async def attempts(self, imports: str, *statements: str) -> list[str]:
        """Run Python statements inside and return those that raised no OSError."""
        tries = (f"try: {statement}; print({statement!r})\nexcept OSError: pass" for statement in statements)
        return (await self.python("\n".join((imports, *tries)))).splitlines()

    async def count_processes(self) -> int:
        """Count the processes that are visible inside, by bash alone."""
        return int((await self.output("all=(/proc/[0-9]*); echo ${#all[@]}")).split()[-1])

    async def prints(self, command: str, text: str, subject: str = "") -> None:
        """Fail unless a command prints this text."""
        equal(await self.output(command), text, subject)

    async def fails(self, command: str, otherwise: str = "") -> None:
        """Fail with `otherwise` unless a command has a non-zero exit code."""
        expect(await self.exit_code(command) != 0, otherwise or f"`{command}` succeeded")

    async def still_works(self, after: str = "") -> None:
        """Fail unless a command works."""
        await self.prints("echo fine", "fine\n", after)

    async def put(self, path: str, content: bytes = b"", *, mode: int = 0o644, mtime: int | None = None) -> None:
        """Write one file."""
        await self.inner.put({path: SandboxFile(content, mode, mtime)})

    @asynccontextmanager
    async def another(self) -> AsyncGenerator[SandboxUnderTest]:
        """Open a second sandbox of the same backend."""
        async with self.backend.open(LIMITS) as sandbox:
            yield SandboxUnderTest(sandbox, self.backend)


RunCheck = Callable[[SandboxUnderTest], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """One property that any sandbox must have, and how to test it."""

    name: str
    category: Category
    claim: str  # one sentence
    run: RunCheck  # raises Failure or NotApplicable
    harmful_if_open: bool = False  # would hurt this machine where nothing isolates


class Outcome(StrEnum):
    """The outcome of a check.

    PASSED: the claim holds. FAILED: it does not. CANNOT: it does not, and the backend's own report says so.
    NOT_APPLICABLE: it could not be tried.
    """

    PASSED = "passed"
    FAILED = "failed"
    CANNOT = "cannot"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check, with the reason."""

    check: Check
    outcome: Outcome
    reason: str = ""  # what was found, or why it could not be tried


def expect(condition: bool, found: str) -> None:
    """Fail with what was found, unless the condition holds."""
    if not condition:
        raise Failure(found)


def equal(got: object, wanted: object, subject: str = "") -> None:
    """Fail unless both are equal."""
    expect(got == wanted, f"{subject}{': ' if subject else ''}got {_shortened(got)}, not {_shortened(wanted)}")


@contextmanager
def raises(kind: type[BaseException], otherwise: str, *, message: str = "") -> Iterator[None]:
    """Fail with `otherwise` unless the block raises such an exception, with `message` in its text."""
    try:
        yield
    except kind as error:
        expect(message in str(error), f"the error says only {error}")
    else:
        raise Failure(otherwise)


@contextmanager
def within(limit_s: float, subject: str) -> Iterator[None]:
    """Fail if the block takes longer."""
    began = time.monotonic()
    yield
    expect((seconds := time.monotonic() - began) < limit_s, f"{subject} took {seconds:.0f} s")


@contextmanager
def folder_of_machine() -> Iterator[Path]:
    """Make a folder of this machine that everybody may write, with a file "secret" in it."""
    with tempfile.TemporaryDirectory(prefix="backtalk-conformance-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "secret").write_text("of the machine")
        yield folder


def processes_with(argument: str) -> list[Path]:
    """Return the /proc folders of this machine's processes that have this argument in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent)
    return found


def isolates(report: BackendReport) -> bool:
    """Return whether a backend says that it keeps commands apart from this machine's files and processes."""
    return all(report.isolation.get(name, "none") != "none" for name in ("files", "processes"))


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"
