"""Tests that the processes a killed trainer leaves are ended at the next start, and no others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backtalk.sandboxes.bubblewrap.backend import sweep

# Starts a process named bwrap that holds a memory file of the given name, leaves it to init, and prints its id.
_LEAVE = """
import os, subprocess, sys
number = os.memfd_create(sys.argv[2])
nowhere = subprocess.DEVNULL
child = subprocess.Popen([sys.argv[1], "60"], pass_fds=[number], stdout=nowhere, stderr=nowhere)
print(child.pid)
os._exit(0)
"""


def leave_behind(folder: Path, mark: str) -> int:
    program = folder / mark / "bwrap"
    program.parent.mkdir()
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    done = subprocess.run(
        [sys.executable, "-c", _LEAVE, str(program), mark], capture_output=True, text=True, check=True
    )
    process_id = int(done.stdout)
    parent = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    if parent != 1:
        os.kill(process_id, signal.SIGKILL)
        pytest.skip("orphans go to another process than 1 here")
    return process_id


def lives(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_orphan_of_ours_is_ended_and_a_stranger_lives(tmp_path: Path) -> None:
    ours = leave_behind(tmp_path, "backtalk")
    stranger = leave_behind(tmp_path, "something-else")
    try:
        assert sweep() >= 1
        until_s = time.monotonic() + 5
        while lives(ours) and time.monotonic() < until_s:
            time.sleep(0.01)
        assert not lives(ours)
        assert lives(stranger)
    finally:
        os.kill(stranger, signal.SIGKILL)
