"""Ctrl-C in a real process: once ends cleanly, twice ends at once."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from backtalk.cli.interrupts import Interrupted, disk_is_full, run

SRC = str(Path(__file__).parents[2] / "src")

PROGRAM = """
import asyncio, sys
from backtalk.cli.interrupts import Interrupted, run

async def work():
    print("working", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("cleaning", flush=True)
        await asyncio.sleep({cleaning_s})
        print("clean", flush=True)

try:
    run(work())
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def start(cleaning_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(cleaning_s=cleaning_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SRC},
    )


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_once_waits_for_the_clean_up(number: signal.Signals, exit_code: int) -> None:
    with start(cleaning_s=0.05) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == exit_code
    assert out == "cleaning\nclean\n"
    assert "again to stop at once" in err


def test_twice_does_not_wait() -> None:
    with start(cleaning_s=60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "clean" not in out


def test_work_that_is_left_alone_returns_its_value_and_the_handlers_are_put_back() -> None:
    async def work() -> int:
        return 7

    before = signal.getsignal(signal.SIGINT)
    assert run(work()) == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cancellation_that_nobody_typed_stays_one() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(work())
    assert Interrupted(signal.SIGINT).exit_code == 130


def test_a_full_disk_is_found_under_what_wraps_it() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert disk_is_full(full)
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = full
    assert disk_is_full(wrapped)
    assert disk_is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))
