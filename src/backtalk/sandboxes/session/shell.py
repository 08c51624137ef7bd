"""The trainer's side of a session: send commands to the shell, and find the outcome of each."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Protocol

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import ExecResult, SandboxLimits
from backtalk.sandboxes.session.exec_server import command_text, frames, restore_text
from backtalk.sandboxes.session.pipes import FloodedError, FrameReader, OutputReader, PipePair, write_all

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0
_KILLED = 128 + signal.SIGKILL
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Keeper(Protocol):
    """The part of a backend that starts and ends the processes of a session, from outside of it."""

    commands: PipePair
    reports: PipePair
    output: PipePair

    async def begin(self, name: str) -> None:
        """Start a supervisor, which starts a shell when it is asked to under the session's name."""
        ...

    async def end(self) -> None:
        """End every process of the session, and return when all are gone."""
        ...

    async def stop(self, tick: int, last_id: int, shell_id: int) -> bool:
        """Kill the shell and what began after clock tick `tick`, or in it with an id above `last_id`. All gone?"""
        ...

    async def lost(self) -> int:
        """Wait until the session ends without being asked to, and return its exit code."""
        ...

    async def close(self) -> None:
        """End every process, and close the ends of the pipes that the session had."""
        ...


class _LostError(Exception):
    """The session ended without being asked to. Its argument is the exit code."""


@dataclass(slots=True)
class _Shell:
    """The shell that is running now, as far as its reports are known."""

    started: str = ""  # the number under which it was started
    id: int = 0  # its process id inside
    last_id: int = 0  # the highest process id given out when it last reported


class Session:
    """A supervisor and its shells, over pipes that live as long as the sandbox."""

    def __init__(self, keeper: Keeper, limits: SandboxLimits) -> None:
        self._keeper, self._commands = keeper, keeper.commands.ours
        self._reports = FrameReader(keeper.reports.ours)
        self._output = OutputReader(keeper.output.ours, limits.output_bytes)
        self._name = ""
        self._shell = _Shell()
        self._exports, self._cwd = "", ""
        self._running_since: int | None = None  # clock tick of a command whose end was not seen
        self._closed = False

    async def begin(self) -> None:
        """Start a supervisor and a shell over clean pipes, with a fresh environment.

        Raises:
            SandboxError: the shell does not answer.
        """
        self._exports, self._cwd = "", ""
        await self._begin()

    async def _begin(self) -> None:
        self._reports.clear()
        self._name = secrets.token_hex(8)
        await self._keeper.begin(self._name)
        await self._start_shell()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._unless_lost(self._shell_id())
        except (TimeoutError, FloodedError, SandboxError, _LostError) as error:
            reason = f"exit code {error.args[0]}" if isinstance(error, _LostError) else "no answer"
            raise SandboxError(f"the sandbox's shell did not start: {self.take_output() or reason}") from error
        self._running_since = None

    async def _shell_id(self) -> int:
        while not self._shell.id:
            self._note(await self._reports.next())
        return self._shell.id

    async def end(self) -> None:
        """End every process, and drop what they printed."""
        self._check()
        await self._keeper.end()
        self._output.take()

    def take_output(self) -> str:
        """Return the output that no command printed: errors of bubblewrap itself."""
        return self._output.take().text.strip()

    async def _start_shell(self) -> None:
        """Ask the supervisor for a shell with the last known variables and folder, without waiting for an answer."""
        self._shell = _Shell(started=secrets.token_hex(8))
        # The empty frame ends one that a stopped shell may have read in part.
        text = frames("", f"start:{self._name}:{self._shell.started}")
        if self._exports:
            text += frames(secrets.token_hex(8), restore_text(self._exports, self._cwd))
        await write_all(self._commands, text)

    async def exec(self, command: str, timeout_s: float, env: Mapping[str, str], cwd: str | None) -> ExecResult:
        """Run one command. See `Sandbox.exec`."""
        text = command_text(command, env, cwd)
        self._check()
        if self._running_since is not None:  # an earlier call was cancelled
            await self._stop(self._running_since)
        number, before = secrets.token_hex(8), self._shell
        tick = int(time.clock_gettime(_CLOCK) * _TICKS_PER_S)
        began = time.perf_counter()
        self._running_since = tick
        exit_code, timed_out = -1, False
        try:
            async with asyncio.timeout(timeout_s):
                await write_all(self._commands, frames(number, text))
                exit_code = await self._outcome(number)
        except TimeoutError:
            timed_out = True
            await self._stop(tick)
        self._running_since = None
        text, dropped_bytes, dropped_at = self._output.take()
        seconds = time.perf_counter() - began
        return ExecResult(text, exit_code, timed_out, dropped_bytes, dropped_at, seconds, self._shell is not before)

    async def _outcome(self, number: str) -> int:
        """Return the exit code from what comes first: the report or the end of the shell, or the end of the session."""
        try:
            return await self._unless_lost(self._report(number))
        except FloodedError:
            exit_code = _KILLED
        except _LostError as error:
            exit_code = error.args[0]
        await self._keeper.end()
        await self._begin()
        return exit_code

    async def _unless_lost(self, wanted: Coroutine[None, None, int]) -> int:
        """Await `wanted` and return its result; raise `_LostError` if the session ends first."""
        lost = asyncio.ensure_future(self._keeper.lost())
        task = asyncio.ensure_future(wanted)
        try:
            await asyncio.wait((lost, task), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _LostError(lost.result())
        finally:
            lost.cancel()
            task.cancel()

    async def _report(self, number: str) -> int:
        while True:
            kind, *fields = self._note(await self._reports.next())
            if kind == "done" and len(fields) == 2 and _is_number(fields[1]):
                cwd, load, exports = [await self._reports.next() for _ in range(3)]
                self._cwd, self._exports = (data.decode("utf-8", "surrogateescape") for data in (cwd, exports))
                last = load.split()[-1:] or [b"0"]
                self._shell.last_id = int(last[0]) if last[0].isdigit() else 0
                if fields[0] == number:
                    return int(fields[1])
            if kind == "exit" and len(fields) == 2 and fields[0] == self._shell.started and _is_number(fields[1]):
                await self._start_shell()
                return int(fields[1])

    def _note(self, frame: bytes) -> list[str]:
        """Split a report into words, and keep the shell's id where it has one."""
        words = frame.decode("utf-8", "replace").split(" ")
        if words[0] == "ready" and len(words) == 2 and words[1].isdigit() and not self._shell.id:
            self._shell.id = int(words[1])
        return words

    async def _stop(self, tick: int) -> None:
        """Kill the command and the shell and start another shell; where that fails, begin the session anew."""
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._shell_id()  # not known yet if the shell is only starting
                if await self._keeper.stop(tick, self._shell.last_id, self._shell.id):
                    while self._note(await self._reports.next())[:2] != ["exit", self._shell.started]:
                        pass
                    await self._start_shell()
                    return
        except (TimeoutError, FloodedError):
            pass
        await self._keeper.end()
        await self._begin()

    def _check(self) -> None:
        if self._closed:  # its descriptors may belong to another pipe by now
            raise SandboxError("the sandbox is closed")

    def close(self) -> None:
        """Close the pipes."""
        self._closed = True
        self._reports.close()
        self._output.close()
        os.close(self._commands)


def _is_number(text: str) -> bool:
    return text.isdigit() and len(text) <= 3
