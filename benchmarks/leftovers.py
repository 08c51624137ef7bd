"""Find what trainers and their sandboxes leave on a machine: processes, control groups, open files, memory."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def own_state() -> dict[str, float]:
    """Return numbers of this process that grow where it leaks."""
    children = [process for process in processes() if parent_of(process) == os.getpid()]
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "children": len(children),
        "zombies": sum(state_of(process) == "Z" for process in children),
        "tasks": len(asyncio.all_tasks()),
        "memory MiB": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20),
    }


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_lines() -> list[tuple[int, list[str]]]:
    found = []
    for process in processes():
        with suppress(OSError):
            found.append((process, Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")))
    return found


def parent_of(process: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return 0


def state_of(process: int) -> str:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    return ""


def orphans() -> set[int]:
    """Return the sandboxes' processes that no living trainer holds: their topmost ancestor is a bubblewrap."""
    found, own = set(), os.readlink("/proc/self/ns/pid")
    for process in processes():
        with suppress(OSError):
            top = process
            while (above := parent_of(top)) > 1:
                top = above
            name = Path(f"/proc/{top}/comm").read_text().strip()
            inside = os.readlink(f"/proc/{process}/ns/pid") != own
            if name == "bwrap" or (inside and top == process):
                found.add(process)
    return found


def groups_of(trainers: list[int]) -> int:
    """Return the control groups that these trainers made."""
    names = tuple(f"backtalk-{trainer}-" for trainer in trainers)
    return sum(name.startswith(names) for _, folders, _ in os.walk("/sys/fs/cgroup") for name in folders)


def shared_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:")) / 1024


def mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


def wait_until_gone(trainers: list[int], before: set[int], most_s: float = 30.0) -> tuple[float, int, int]:
    """Return the seconds until nothing of the trainers is left, and the processes and control groups that remain.

    Only what is seen twice counts: a process that ends while it is looked at seems to have no parent it.
    """
    began, seen = time.monotonic(), orphans()
    while True:
        now = orphans()
        left, seen = (seen & now) - before, now
        groups = groups_of(trainers)
        if (not left and not groups) or time.monotonic() - began > most_s:
            return time.monotonic() - began, len(left), groups
        time.sleep(0.05)


def settled(measure: Callable[[], float], most: float, most_s: float = 10.0) -> float:
    """Return a number of the whole machine once it is at most `most`, or the last one: others use the machine too."""
    until_s = time.monotonic() + most_s
    while (found := measure()) > most and time.monotonic() < until_s:
        time.sleep(0.1)
    return found
