"""Sandboxes: isolated places, looking like a machine, in which the commands of a model run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from backtalk.errors import ConfigError, SandboxUnavailable
from backtalk.sandboxes.base import BackendReport, ExecResult, Sandbox, SandboxBackend, SandboxFile, SandboxLimits

__all__ = [
    "BackendReport",
    "ExecResult",
    "Sandbox",
    "SandboxBackend",
    "SandboxChoice",
    "SandboxFile",
    "SandboxLimits",
    "local_sandbox",
]

NEEDS_LINUX = "bubblewrap and Landlock isolate commands on Linux only, so nothing runs in a terminal here"
ELSEWHERE = (
    "What works: import, account, export, score, view, show, report, check, and training with worlds of Python classes "
    "or OpenEnv servers. For terminals take a Linux machine, virtual machine or container, or an environment of Harbor "
    "(docs/harbor.md)"
)

SandboxChoice = Literal["auto", "bubblewrap", "sandlock", "unsafe"]


def local_sandbox(
    choice: SandboxChoice = "auto", root: str | Path | None = None, readable: Sequence[str] = ()
) -> SandboxBackend:
    """Return the sandbox backend for this machine, after a trial start.

    ``auto`` takes the first that works of bubblewrap (as root with a uid for each sandbox, else under the user's own)
    and sandlock (Landlock and seccomp, where namespaces are blocked), and refuses where neither does. Both keep
    commands from the network, from this machine's files and from the verifier; sandlock isolates less, which its report
    says first. ``auto`` never takes ``unsafe``. For containers see `backtalk.sandboxes.harbor.backend.HarborBackend`.

    ``root`` is a file system to start from in place of this machine's programs; only bubblewrap takes one.
    ``readable`` are folders of this machine that are shown read-only at their own paths, beside its programs.

    Raises:
        SandboxUnavailable: no safe backend works; the message says what was tried, and what to install or to allow.
        ConfigError: an unknown choice, or a ``root`` for a backend that takes none.
    """
    if sys.platform != "linux" and choice != "unsafe":
        raise SandboxUnavailable(f"no sandbox on {platform.system()}: {NEEDS_LINUX}. {ELSEWHERE}")
    if root is not None and choice not in ("auto", "bubblewrap"):
        raise ConfigError(f"sandbox {choice!r} cannot start from a file system of its own; use bubblewrap, or no root")
    match choice:
        case "auto":
            return _open_first_that_works(root, readable)
        case "bubblewrap":
            return _open_bubblewrap(root, readable)
        case "sandlock":
            return _open_sandlock(readable)
        case "unsafe":
            from backtalk.sandboxes.unsafe import UnsafeBackend

            return UnsafeBackend()
        case _:
            raise ConfigError(
                f"sandbox {choice!r} is not known; use auto, bubblewrap, sandlock or unsafe. Containers are "
                "backtalk.sandboxes.harbor.backend.HarborBackend('docker'), which takes the place of local_sandbox(...)"
            )


def _open_first_that_works(root: str | Path | None, readable: Sequence[str]) -> SandboxBackend:
    try:
        return _open_bubblewrap(root, readable)
    except SandboxUnavailable as error:
        first = str(error)
    second = "it cannot start from a file system of its own"
    if root is None:
        try:
            reason = f"sandlock is in force because bubblewrap, tried first, is not available: {first}"
            return _open_sandlock(readable, reason)
        except SandboxUnavailable as error:
            second = str(error)
    raise SandboxUnavailable(
        "no safe sandbox works on this machine. Tried, in this order:\n"
        f"  bubblewrap: {first}\n"
        f"  sandlock: {second}\n"
        "Any one of these helps. Or use containers: pip install 'backtalk[harbor]', and "
        "backtalk.sandboxes.harbor.backend.HarborBackend('docker'). Sandbox 'unsafe' runs everywhere and isolates "
        "nothing: for commands that you would run yourself"
    )


def _open_bubblewrap(root: str | Path | None, readable: Sequence[str]) -> SandboxBackend:
    from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend, sweep
    from backtalk.sandboxes.images.open import open_root

    sweep()
    return BubblewrapBackend(root=open_root(None if root is None else str(root)), readable=readable)


def _open_sandlock(readable: Sequence[str], fallback_reason: str = "") -> SandboxBackend:
    from backtalk.sandboxes.sandlock.backend import SandlockBackend

    return SandlockBackend(fallback_reason=fallback_reason, readable=readable)
