"""Protocols and data of sandboxes: what any backend offers to an environment, and the limits it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

HOME = "/home/agent"  # the folder in which a session starts, and which tasks name
NO_ENV: Mapping[str, str] = MappingProxyType({})
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """The most that one sandbox may use."""

    memory_mb: int = 512
    """Megabytes of memory."""
    processes: int = 64
    """Processes and threads at once."""
    disk_mb: int = 64
    """Megabytes of files it may write."""
    output_bytes: int = 65_536
    """Bytes kept of the output of one command, half of each end; the rest is read, counted and dropped."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """The result of one command. A non-zero exit or a time-out is a result, not an exception."""

    output: str  # stdout and stderr, interleaved as written; UTF-8 with replacement characters
    exit_code: int  # 128 + signal where a signal ended it; -1 where it timed out
    timed_out: bool = False
    dropped_bytes: int = 0  # output beyond the limit
    dropped_at: int = 0  # the character of `output` before which they were
    seconds: float = 0.0
    new_shell: bool = False  # the shell ended; the next has its folder and exported variables, and nothing else of it


@dataclass(frozen=True, slots=True)
class SandboxFile:
    """A file to be put into a sandbox."""

    content: bytes
    mode: int = 0o644
    mtime: int | None = None  # seconds since 1970, UTC; None is now


class Sandbox(Protocol):
    """An isolated place that looks like a machine, and lives for one rollout.

    Raises:
        SandboxError: from any method, when the sandbox is broken. The rollout fails; the training step goes on.
    """

    async def exec(
        self, command: str, *, timeout_s: float, env: Mapping[str, str] = ..., cwd: str | None = None
    ) -> ExecResult:
        """Run a bash command in the one long-lived session: cwd, exported variables and background jobs persist."""
        ...

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        """Write files by absolute path inside, making parent folders and replacing what is in the way."""
        ...

    async def get(self, path: str, *, max_bytes: int = 1 << 20) -> bytes | None:
        """Return the content of a regular file, or None where there is none that can be read. Links stay inside.

        Raises:
            SandboxError: the file is larger than `max_bytes`.
        """
        ...

    async def restart(self) -> None:
        """End every process and begin a fresh process namespace and shell over the same files."""
        ...


@dataclass(frozen=True, slots=True)
class BackendReport:
    """The backend that is in use, and what it isolates and limits on this machine."""

    name: str
    isolation: Mapping[str, str] = field(default_factory=dict)  # "network" -> "none", "user" -> "uid 100000 outside"
    limits: Mapping[str, str] = field(default_factory=dict)  # "memory" -> "cgroup v1", "processes" -> "rlimit"
    warnings: tuple[str, ...] = ()
    cannot: Mapping[str, str] = field(default_factory=dict)  # checks of the conformance suite it does not pass, and why


class SandboxBackend(Protocol):
    """A maker of sandboxes."""

    @property
    def report(self) -> BackendReport:
        """Return the backend's isolation and limits."""
        ...

    def open(self, limits: SandboxLimits) -> AbstractAsyncContextManager[Sandbox]:
        """Start a fresh sandbox, which is closed with everything in it on exit.

        Raises:
            SandboxError: on entry, when it could not start.
        """
        ...


class Arrival:
    """A rollout whose environment is being opened. This base class does nothing; it stands for no rollout."""

    def wait(self) -> None:
        """Note that the environment can open only after another rollout ends, so that others do not wait for it."""

    def go_on(self) -> None:
        """Note that the environment waits no longer."""


arrival: ContextVar[Arrival] = ContextVar("arrival", default=Arrival())  # noqa: B039 (it has no state)
