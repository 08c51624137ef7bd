"""One writer a folder: who holds it is said, and the lock dies with its process, whatever it left running."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backtalk.errors import ConfigError, DataError
from backtalk.run.log import RunLog, lock_file, lock_folder

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from backtalk.run.log import lock_folder
with lock_folder(Path(sys.argv[1])):
    child = {child}
    print(child, flush=True)
    time.sleep(600)
"""
STARTED = 'subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL).pid'  # as a sandbox is
FORKED = "os.fork() or (os.close(1), time.sleep(600))"  # as multiprocessing does, never to call exec


def holder(folder: Path, child: str = "0") -> tuple[subprocess.Popen[str], int]:
    """Start a process that holds the lock of ``folder``; return it and the child that it started."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(child=child), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_writer_is_told_which_process_writes_since_when(tmp_path: Path) -> None:
    process, _ = holder(tmp_path / "run")
    said = rf"run is being written by process {process.pid} on {socket.gethostname()} since 20\d\d-\d\d-\d\d "
    try:
        with pytest.raises(ConfigError, match=said), lock_folder(tmp_path / "run"):
            pass
        with pytest.raises(ConfigError, match=said), lock_folder(tmp_path / "run"):  # a refusal takes nothing away
            pass
        RunLog(tmp_path / "run").read_metrics()  # and readers go on
        with lock_folder(Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))):  # of which nobody is the writer
            pass
    finally:
        end(process)
    with lock_folder(tmp_path / "run"):  # killed: its file is still there
        pass


def wait_until_free(folder: Path) -> None:
    while True:
        try:
            with lock_folder(folder):
                return
        except ConfigError:
            time.sleep(0.05)


@pytest.mark.parametrize("child", [STARTED, FORKED], ids=["started", "forked"])
def test_a_child_that_lives_on_does_not_keep_the_lock_of_a_killed_writer(tmp_path: Path, child: str) -> None:
    process, pid = holder(tmp_path / "run", child)
    try:
        process.kill()
        process.wait()
        os.kill(pid, 0)  # it lives
        wait_until_free(tmp_path / "run")  # a fork lets go of the lock once it is run at all
    finally:
        os.kill(pid, 9)
        end(process)


def test_one_process_cannot_write_twice_and_closing_the_file_elsewhere_keeps_the_lock(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / ".lock").read_bytes()  # where a POSIX record lock would be lost
        with pytest.raises(ConfigError, match=f"process {os.getpid()} "), lock_folder(tmp_path / "run"):
            pass


def test_what_stays_empty_is_removed_and_what_was_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with lock_folder(tmp_path / "old"):
        assert os.listdir(tmp_path / "old") == [".lock"]
    assert os.listdir(tmp_path / "old") == []
    out, said = tmp_path / "out.jsonl", r"out\.jsonl is being written by process"
    with lock_file(out), pytest.raises(ConfigError, match=said), lock_file(out):
        pass
    assert os.listdir(tmp_path) == ["old"]


def test_of_many_at_once_one_writes_at_a_time(tmp_path: Path) -> None:
    """Each ends while others begin, so the file is removed under those that have just opened it."""
    inside, most, turns = 0, 0, 0

    def write() -> None:
        nonlocal inside, most, turns
        for _ in range(200):
            try:
                with lock_file(tmp_path / "out"):
                    inside += 1
                    most, turns = max(most, inside), turns + 1
                    inside -= 1
            except ConfigError:
                continue

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == (1, 0) and turns > 0


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = r"cannot write .*file/run.*choose a folder that you can write to"
    with pytest.raises(DataError, match=said), lock_folder(tmp_path / "file" / "run"):
        pass
