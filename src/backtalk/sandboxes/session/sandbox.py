"""Run the commands of a sandbox in one session: what every backend shares that keeps a shell alive inside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from backtalk.sandboxes.base import NO_ENV, ExecResult, SandboxLimits
from backtalk.sandboxes.session.shell import Keeper, Session


class SessionSandbox:
    """The session of a sandbox; a backend's own class adds `put` and `get`, which make it a `Sandbox`.

    Raises:
        SandboxError: from any method, when it is broken.
    """

    settle_s = 0.0  # to wait before a command, where only the clock tells which processes it started

    def __init__(self, keeper: Keeper, limits: SandboxLimits) -> None:
        self._keeper, self._session = keeper, Session(keeper, limits)
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the first session. The backend calls this once."""
        await self._session.begin()

    async def exec(
        self, command: str, *, timeout_s: float, env: Mapping[str, str] = NO_ENV, cwd: str | None = None
    ) -> ExecResult:
        """Run a bash command in the one long-lived shell. `env` is for this command; `cwd` moves the shell there.

        Folder, variables, functions and background jobs stay for the next command. What a background job prints later
        is part of the output of a later command. Standard input is empty.

        A command that runs longer than `timeout_s` is killed with all it started, and the shell with it. A new shell
        takes the folder and the exported variables from before that command. Functions and other variables are lost;
        older background jobs go on. The same holds after a command that ends the shell (`exit 3`).
        """
        async with self._lock:
            await asyncio.sleep(self.settle_s)
            return await self._session.exec(command, timeout_s, env, cwd if cwd is None else self._place(cwd))

    def _place(self, cwd: str) -> str:
        """Return where commands see the folder `cwd` of the sandbox."""
        return cwd

    async def restart(self) -> None:
        """End every process and begin a fresh session over the same files."""
        async with self._lock:
            await self._session.end()
            await self._session.begin()

    async def close(self) -> None:
        """End the sandbox and everything in it."""
        try:
            await self._keeper.close()
        finally:
            self._session.close()
