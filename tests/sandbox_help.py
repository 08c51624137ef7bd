"""Helpers of the sandbox tests: a backend where the machine has one, and what a sandbox left behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import BackendReport, ExecResult, Sandbox, SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend


def backend_or_skip(*, use_cgroups: bool = True) -> BubblewrapBackend:
    """Return the bubblewrap backend, or skip the test with what to install."""
    try:
        return BubblewrapBackend(use_cgroups=use_cgroups)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def children() -> list[int]:
    """Return the processes that this one has started, zombies too."""
    own = str(os.getpid())
    return _processes(lambda folder: (folder / "stat").read_text().rpartition(")")[2].split()[1] == own)


def groups(process: int | None = None) -> list[Path]:
    """Return the control groups that a trainer has made, by default this process."""
    found = []
    for folder, names, _ in os.walk("/sys/fs/cgroup"):  # skips what vanishes meanwhile
        found += [Path(folder, name) for name in names if name.startswith(f"backtalk-{process or os.getpid()}-")]
    return found


def open_files() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def with_argument(argument: str) -> list[int]:
    """Return the processes on the whole machine that carry `argument` in their command line."""
    return _processes(lambda folder: argument.encode() in (folder / "cmdline").read_bytes().split(b"\0"))


def with_in_environment(mark: str) -> list[int]:
    """Return the processes on the whole machine that were started with `mark` in a variable."""
    return _processes(lambda folder: mark.encode() in (folder / "environ").read_bytes())


def _processes(matches: Callable[[Path], bool]) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if matches(folder):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def started(argument: str) -> list[int]:
    """Wait for a job that was just sent to the background, and return its processes as `with_argument` does."""
    until_s = time.monotonic() + 20  # a loaded machine takes its time
    while not (found := with_argument(argument)) and time.monotonic() < until_s:
        time.sleep(0.01)
    return found


@dataclass(eq=False)
class FakeSandbox:
    """A sandbox without a machine, which notes whether it is alive and how often it was used."""

    limits: SandboxLimits
    alive: bool = True
    uses: int = 0

    async def exec(
        self, command: str, *, timeout_s: float, env: Mapping[str, str] = {}, cwd: str | None = None
    ) -> ExecResult:
        if not self.alive:
            raise SandboxError("it is dead")
        return ExecResult("", 0)

    async def put(self, files: Mapping[str, SandboxFile]) -> None: ...

    async def get(self, path: str, *, max_bytes: int = 0) -> bytes | None: ...

    async def restart(self) -> None: ...


@dataclass(eq=False)
class CountingBackend:
    """A backend that counts what is starting and alive. ``before`` runs at each start: to break or delay it."""

    before: Callable[[int], object] = lambda number: None
    pause_s: float = 0.001
    report: BackendReport = field(default_factory=lambda: BackendReport("counting"))
    made: list[FakeSandbox] = field(default_factory=list)
    starting: int = 0
    live: int = 0
    most_starting: int = 0
    most_live: int = 0
    starts: int = 0

    @asynccontextmanager
    async def open(self, limits: SandboxLimits) -> AsyncGenerator[Sandbox]:
        self.starts += 1
        self.starting += 1
        self.most_starting = max(self.most_starting, self.starting)
        try:
            self.before(self.starts)
            await asyncio.sleep(self.pause_s)
        finally:
            self.starting -= 1
        sandbox = FakeSandbox(limits)
        self.made.append(sandbox)
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        try:
            yield sandbox
        finally:
            await asyncio.sleep(self.pause_s)
            sandbox.alive = False
            self.live -= 1
