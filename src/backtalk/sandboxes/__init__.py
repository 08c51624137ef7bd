"""Isolated places where commands of a stranger run."""

from __future__ import annotations

from typing import Literal

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import BackendReport, ExecResult, Sandbox, SandboxBackend, SandboxFile, SandboxLimits

__all__ = [
    "BackendReport",
    "ExecResult",
    "Sandbox",
    "SandboxBackend",
    "SandboxFile",
    "SandboxLimits",
    "local_sandbox",
]


def local_sandbox(choice: Literal["auto", "bubblewrap", "unsafe"] = "auto") -> SandboxBackend:
    """The backend for this machine, after a real trial start. Never falls back to one that isolates less.

    Raises:
        SandboxUnavailable: there is no safe one; the message says what to install or to allow.
        ConfigError: an unknown choice.
    """
    match choice:
        case "auto" | "bubblewrap":
            from backtalk.sandboxes.bubblewrap import BubblewrapBackend
            from backtalk.sandboxes.sweep import sweep

            sweep()
            return BubblewrapBackend()
        case "unsafe":
            from backtalk.sandboxes.unsafe import UnsafeBackend

            return UnsafeBackend()
        case _:
            raise ConfigError(f"sandbox {choice!r} is not known; use auto, bubblewrap or unsafe")
