"""Measure how many sandboxes this machine can hold at once, from what it has left.

A sandbox that waits for the policy costs about 3.5 MiB, 5 processes and 7 open files of the trainer (measured in
docs/sandbox_speed.md). Its limits allow far more: 256 sandboxes with the usual limits could ask for 128 GiB. Memory for
all of them would leave most of a machine idle; none at all would let a few greedy commands end the trainer. So memory
and processes are counted for one in eight at its limits, and a pool starts no sandbox while memory is short
(`memory_is_short`).

Trainings that are started together share the machine: the variable `SHARED_BY` says how many they are, and each takes
its part. Open files are counted for each process, so they are not shared.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backtalk.sandboxes.base import SandboxLimits
from backtalk.sandboxes.machine.cgroup import own_groups

SHARED_BY = "BACKTALK_SHARED_BY"  # environment variable: trainings that were started together
PER_CORE = 128  # sandboxes; with more, a command waits for its turn longer than it runs
STARTS_PER_CORE = 4  # at once; with more, each start only takes longer
_MEMORY_MB, _PROCESSES, _OPEN_FILES = 4, 8, 8  # of an idle sandbox, helpers of its start included
_AT_LIMITS = 8  # one sandbox in so many is at its limits
_KEPT_FILES = 64  # for the trainer: files of a model, a tracker, pipes of starts
_KEPT_PROCESSES = 256  # for the trainer: mostly threads of torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Resources that are left for this process and its children."""

    cores: float
    memory_mb: float
    processes: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """The number of sandboxes that can be alive at once, and in words the resource that bounds it."""

    sandboxes: int
    bound: str


def capacity(limits: SandboxLimits, left: Resources | None = None) -> Capacity:
    """Return how many sandboxes with these limits can be alive at once: as many as the scarcest resource allows.

    At least 1. `left` None is what this machine has left.
    """
    left = left or available_resources()
    each_processes = _PROCESSES + limits.processes / _AT_LIMITS
    bounds = (
        (int(left.cores * PER_CORE), f"{left.cores:g} processor cores"),
        (carried_by_memory(limits, left.memory_mb), f"{left.memory_mb:.0f} MiB of memory left"),
        (int((left.processes - _KEPT_PROCESSES) / each_processes), f"{left.processes} processes left"),
        ((left.open_files - _KEPT_FILES) // _OPEN_FILES, f"{left.open_files} open files left (ulimit -n)"),
    )
    number, bound = min(bounds)
    return Capacity(max(1, number), bound)


def carried_by_memory(limits: SandboxLimits, memory_mb: float) -> int:
    """Return how many sandboxes this much memory carries; an eighth of it is left for the trainer to grow."""
    return int(memory_mb * (1 - 1 / _AT_LIMITS) / (_MEMORY_MB + limits.memory_mb / _AT_LIMITS))


def memory_is_short(limits: SandboxLimits) -> bool:
    """Return whether too little memory is left for one more sandbox at its limits."""
    return available_mb() < limits.memory_mb + _MEMORY_MB


def available_resources() -> Resources:
    """Measure the resources left for this training, in the machine and in every control group above this process."""
    shared_by = max(1, int(os.environ.get(SHARED_BY, 1)))
    return Resources(
        cores=cores() / shared_by,
        memory_mb=available_mb() / shared_by,
        processes=_processes_left() // shared_by,
        open_files=_soft_limit(resource.RLIMIT_NOFILE) - len(os.listdir("/proc/self/fd")),
    )


def cores() -> float:
    """Return how many processors this process may use; a fraction where a control group limits their time."""
    shares = [float(len(os.sched_getaffinity(0)))]
    for folder in own_groups("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:  # "max" is no number, -1 is no limit
                shares.append(int(quota) / int(period))
    return min(shares)


def available_mb() -> float:
    """Return the memory in MiB that is free, or can be freed without taking any from running processes."""
    found = [_field(Path("/proc/meminfo"), "MemAvailable:") / 1024]
    for folder, limit in _limited_groups():
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if used is not None:
            # The kernel counts cached files as used, and gives them up when memory is needed.
            idle = max(_field(folder / "memory.stat", name) for name in ("inactive_file", "total_inactive_file"))
            found.append((limit - used + idle) / (1 << 20))
    return max(0.0, min(found))


def memory_limits() -> list[int]:
    """Return the limits in bytes of the control groups that this process is in."""
    return [limit for _, limit in _limited_groups()]


def _limited_groups() -> Iterator[tuple[Path, int]]:
    for folder in own_groups("memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is not None and limit < 1 << 60:  # version 1 writes a huge number for none
            yield folder, limit


def _processes_left() -> int:
    with open("/proc/loadavg") as file:
        running = int(file.read().split()[3].partition("/")[2])
    left = [int(Path("/proc/sys/kernel", name).read_text()) - running for name in ("pid_max", "threads-max")]
    for folder in own_groups("pids"):
        limit, used = _number(folder, "pids.max"), _number(folder, "pids.current")
        if limit is not None and used is not None:
            left.append(limit - used)
    if os.getuid():  # root's sandboxes each run under a uid of their own, and are counted apart
        left.append(_soft_limit(resource.RLIMIT_NPROC) - _own_threads())
    return min(left)


def _own_threads() -> int:
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                count += len(os.listdir(folder / "task"))
    return count


def _soft_limit(kind: int) -> int:
    soft = resource.getrlimit(kind)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def _number(folder: Path, *names: str) -> int | None:
    """Return the number in the first of these files that has one; None where there is none, or it says "max"."""
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return None


def _field(path: Path, name: str) -> int:
    """Return the number after `name` in a file with a field a line; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.split()
            if words and words[0] == name:
                return int(words[1])
    return 0
