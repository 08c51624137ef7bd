"""What a check is made of: a sandbox to try it in, and words for what was found."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from backtalk.sandboxes.base import BackendReport, ExecResult, Sandbox, SandboxBackend, SandboxFile, SandboxLimits

LIMITS = SandboxLimits(memory_mb=96, processes=24, disk_mb=16)
WAIT_S = 20.0  # for a command that ends by itself; a loaded machine takes its time
COUNT = "all=(/proc/[0-9]*); echo ${#all[@]}"  # of processes, by bash alone


class Failure(Exception):
    """A check found what should not be."""


class NotApplicable(Exception):
    """A check cannot be tried here; the message says why."""


class Category(StrEnum):
    """BEHAVIOUR what every environment relies on; LIMIT what one sandbox may use; ATTACK what an agent might try
    against the machine, the trainer, other rollouts or the verifier; HYGIENE what is left when it is over."""

    BEHAVIOUR = "behaviour"
    LIMIT = "limit"
    ATTACK = "attack"
    HYGIENE = "hygiene"


class Box:
    """A fresh sandbox of the backend under test, with short ways to say what is done in it."""

    def __init__(self, sandbox: Sandbox, backend: SandboxBackend) -> None:
        self.sandbox = sandbox
        self.backend = backend

    async def run(self, command: str, *, timeout_s: float = WAIT_S) -> ExecResult:
        """The whole result of a command."""
        return await self.sandbox.exec(command, timeout_s=timeout_s)

    async def out(self, command: str, *, timeout_s: float = WAIT_S) -> str:
        """What a command printed."""
        return (await self.run(command, timeout_s=timeout_s)).output

    async def code(self, command: str) -> int:
        """The exit code of a command whose words nobody wants."""
        return (await self.run(f"{{ {command}\n}} >/dev/null 2>&1")).exit_code

    async def python(self, program: str) -> str:
        """What a Python program prints inside.

        Raises:
            NotApplicable: there is no python3 inside.
        """
        if await self.code("command -v python3") != 0:
            raise NotApplicable("no python3 inside to try it with")
        return await self.out(f"python3 -c {shlex.quote(program)}")

    async def put(self, path: str, content: bytes = b"", *, mode: int = 0o644, mtime: int | None = None) -> None:
        """Write one file."""
        await self.sandbox.put({path: SandboxFile(content, mode, mtime)})

    async def get(self, path: str) -> bytes | None:
        """Read one file."""
        return await self.sandbox.get(path)

    @asynccontextmanager
    async def another(self) -> AsyncGenerator[Box]:
        """A second sandbox of the same backend."""
        async with self.backend.open(LIMITS) as sandbox:
            yield Box(sandbox, self.backend)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing any sandbox must show."""

    name: str
    category: Category
    shows: str  # one sentence
    run: Callable[[Box], Awaitable[None]]
    harmful_if_open: bool = False  # would hurt this machine where nothing isolates


class Outcome(StrEnum):
    """PASSED it was shown; FAILED it was tried, and not so; CANNOT not so, and the backend's own report says it;
    NOT_APPLICABLE it could not be tried."""

    PASSED = "passed"
    FAILED = "failed"
    CANNOT = "cannot"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of one check."""

    check: Check
    outcome: Outcome
    reason: str = ""  # what was found, or why it could not be tried
    seconds: float = 0.0


def made(
    category: Category, *functions: Callable[[Box], Awaitable[None]], harmful_if_open: bool = False
) -> tuple[Check, ...]:
    """Checks of functions: the name is the function's, the sentence its docstring."""
    return tuple(
        Check(function.__name__, category, " ".join((function.__doc__ or "").split()), function, harmful_if_open)
        for function in functions
    )


def expect(holds: bool, found: str) -> None:
    """Fail with what was found, unless `holds`."""
    if not holds:
        raise Failure(found)


def same(got: object, wanted: object, what: str = "") -> None:
    """Fail unless both are equal."""
    expect(got == wanted, f"{what}{': ' if what else ''}got {_short(got)}, not {_short(wanted)}")


def isolates(report: BackendReport) -> bool:
    """Whether a backend says that it keeps commands apart from this machine's files and processes."""
    return all(report.isolation.get(name, "none") != "none" for name in ("files", "processes"))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"
