"""Checks that nothing is left when a sandbox is closed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from backtalk.errors import SandboxError
from backtalk.sandboxes.conformance.base import SandboxUnderTest, equal, processes_with, raises, within


@asynccontextmanager
async def _leaves_nothing(sandbox: SandboxUnderTest) -> AsyncGenerator[SandboxUnderTest]:
    """Open another sandbox; fail if files or processes of the trainer's are left after its end. Drops RuntimeError."""
    before = _open_files_and_children()
    with contextlib.suppress(RuntimeError):
        async with sandbox.another() as other:
            yield other
    equal(_open_files_and_children(), before, "open files and processes of the trainer's")


def _open_files_and_children() -> tuple[int, int]:
    """Count this process's open files, and the processes that it started and has not waited for."""
    children = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children += int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid()
    return len(os.listdir("/proc/self/fd")), children


async def no_process_is_left(sandbox: SandboxUnderTest) -> None:
    """Check that closing ends every process, those in other sessions too."""
    mark = secrets.token_hex(8)
    async with _leaves_nothing(sandbox) as other:
        await other.exec(f"bash -c 'sleep 99; :' {mark} & (setsid bash -c 'sleep 99; :' {mark} &) ; sleep 0.2")
    equal(processes_with(mark), [], "processes")


async def no_file_is_left_open(sandbox: SandboxUnderTest) -> None:
    """Check that using a sandbox in every way, time-outs and restarts too, leaves no open file and no process."""
    async with _leaves_nothing(sandbox) as other:
        await other.exec("sleep 99", timeout_s=0.2)
        await other.put("/home/agent/f", b"x")
        await other.get("/home/agent/f")
        await other.exec("exit 3")
        await other.restart()


async def ends_after_a_bomb(sandbox: SandboxUnderTest) -> None:
    """Check that a sandbox full of processes is closed in seconds, with nothing left."""
    with within(20, "filling and closing it"):
        async with _leaves_nothing(sandbox) as other:
            await other.exec("(for i in {1..60}; do setsid sleep 99 & done) 2>/dev/null; sleep 0.1", timeout_s=1)


async def closed_after_an_error(sandbox: SandboxUnderTest) -> None:
    """Check that an exception of the caller's closes the sandbox like any other end."""
    async with _leaves_nothing(sandbox):
        raise RuntimeError("of the caller's")


async def cancelled_starts(sandbox: SandboxUnderTest) -> None:
    """Check that a start or a command that is cancelled at any moment leaves nothing."""
    before = _open_files_and_children()

    async def hold() -> None:
        async with sandbox.another() as other:
            await other.exec("sleep 1051", timeout_s=60)

    for wait_s in (0.0, 0.005, 0.02, 0.05, 0.2):
        task = asyncio.create_task(hold())
        await asyncio.sleep(wait_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    equal(_open_files_and_children(), before, "open files and processes of the trainer's")


async def closed_is_an_error(sandbox: SandboxUnderTest) -> None:
    """Check that a closed sandbox raises SandboxError and never gives a result."""
    async with sandbox.another() as other:
        pass
    with raises(SandboxError, "a command of a closed sandbox gave a result"):
        await other.exec("true")


async def nothing_of_the_last_one(sandbox: SandboxUnderTest) -> None:
    """Check that a fresh sandbox has nothing of those before it."""
    name = f"backtalk-{secrets.token_hex(8)}"
    paths = f"/tmp/{name} /dev/shm/{name} ~/{name}"
    async with sandbox.another() as first:
        await first.exec(f"for f in {paths}; do echo 1 >$f; done")
    async with sandbox.another() as second:
        left = await second.output(f"ls {paths} 2>/dev/null")
    for folder in ("/tmp", "/dev/shm"):  # of this machine, where nothing isolates
        with contextlib.suppress(OSError):
            Path(folder, name).unlink(missing_ok=True)
    equal(left, "")
