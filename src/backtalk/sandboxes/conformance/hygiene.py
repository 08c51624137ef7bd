"""What is left when a sandbox is over: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from backtalk.errors import SandboxError
from backtalk.sandboxes.conformance.base import LIMITS, WAIT_S, Box, Category, Failure, expect, made, same


def _children() -> int:
    """Processes that this one has started and not seen the end of."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            count += int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid()
    return count


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), _children()


def _with_argument(argument: str) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count += argument.encode() in path.read_bytes().split(b"\0")
    return count


async def _leaves_nothing(box: Box, use: Callable[[Box], Awaitable[None]]) -> None:
    before = _held()
    with contextlib.suppress(RuntimeError):
        async with box.another() as other:
            await use(other)
    same(_held(), before, "open files and processes of the trainer's")


async def no_process_is_left(box: Box) -> None:
    """Closing ends every process, those in sessions of their own too."""
    mark = secrets.token_hex(8)

    async def use(other: Box) -> None:
        await other.run(f"bash -c 'sleep 99; :' {mark} & (setsid bash -c 'sleep 99; :' {mark} &) ; sleep 0.2")

    await _leaves_nothing(box, use)
    same(_with_argument(mark), 0, "processes")


async def no_file_is_left_open(box: Box) -> None:
    """Using a sandbox in every way, time-outs and restarts too, leaves no file open and no process behind."""

    async def use(other: Box) -> None:
        await other.run("sleep 99", timeout_s=0.2)
        await other.put("/home/agent/f", b"x")
        await other.get("/home/agent/f")
        await other.run("exit 3")
        await other.sandbox.restart()

    await _leaves_nothing(box, use)


async def ends_after_a_bomb(box: Box) -> None:
    """A sandbox full of processes is closed in seconds, with nothing left."""
    began = time.monotonic()

    async def use(other: Box) -> None:
        await other.run("(for i in {1..60}; do setsid sleep 99 & done) 2>/dev/null; sleep 0.1", timeout_s=1)

    await _leaves_nothing(box, use)
    expect(time.monotonic() - began < 20, f"it took {time.monotonic() - began:.0f} s")


async def closed_after_an_error(box: Box) -> None:
    """An exception of the caller's closes the sandbox like any other end."""

    async def use(other: Box) -> None:
        raise RuntimeError("of the caller's")

    await _leaves_nothing(box, use)


async def cancelled_starts(box: Box) -> None:
    """A start or a use that is cancelled at any moment leaves nothing behind."""
    before = _held()

    async def hold() -> None:
        async with box.another() as other:
            await other.run("sleep 1051", timeout_s=60)

    for wait_s in (0.0, 0.005, 0.02, 0.05, 0.2):
        task = asyncio.create_task(hold())
        await asyncio.sleep(wait_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    same(_held(), before, "open files and processes of the trainer's")


async def closed_is_an_error(box: Box) -> None:
    """A sandbox that is closed answers with SandboxError, never with a result."""
    async with box.backend.open(LIMITS) as sandbox:
        pass
    try:
        await sandbox.exec("true", timeout_s=WAIT_S)
    except SandboxError:
        return
    raise Failure("a command of a closed sandbox gave a result")


async def nothing_of_the_last_one(box: Box) -> None:
    """A fresh sandbox has nothing of those before it."""
    name = f"backtalk-{secrets.token_hex(8)}"
    places = f"/tmp/{name} /dev/shm/{name} ~/{name}"
    async with box.another() as first:
        await first.run(f"for f in {places}; do echo 1 >$f; done")
    async with box.another() as second:
        left = await second.out(f"ls {places} 2>/dev/null")
    for folder in ("/tmp", "/dev/shm"):  # of this machine, where nothing isolates
        with contextlib.suppress(OSError):
            Path(folder, name).unlink(missing_ok=True)
    same(left, "")


CHECKS = made(
    Category.HYGIENE,
    no_process_is_left,
    no_file_is_left_open,
    ends_after_a_bomb,
    closed_after_an_error,
    cancelled_starts,
    closed_is_an_error,
    nothing_of_the_last_one,
)
