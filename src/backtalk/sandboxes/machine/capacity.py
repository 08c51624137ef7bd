"""Measure how many sandboxes this machine can hold at once, from what it has left.

A sandbox that waits for the policy to say something costs about 3.5 MiB, 5 processes and 7 open files of the trainer
(docs/sandbox_speed.md has the measurement). What it may use at most is far more: 256 of them with the usual limits
could ask for 128 GiB. To hold room for that would leave most of every machine idle, and to hold none would let a few
greedy commands end the trainer. So room is held for one in eight at its limits, and a pool starts no more while
memory is short (`memory_is_short`).

Trainings that are started together share the machine: whoever starts them says by `SHARED_BY` how many there are, and
each takes its part. Open files are counted for each process, so they are not shared.
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
PER_CORE = 128  # that wait most of the time; beyond it a command waits for its turn longer than it runs
STARTS_PER_CORE = 4  # at once: the kernel makes some of it wait, and with more each only takes longer
_MEMORY_MB, _PROCESSES, _OPEN_FILES = 4, 8, 8  # of one that does nothing, helpers of a start included
_AT_LIMITS = 8  # one in so many is at its limits
_KEPT_FILES = 64  # for the trainer: a model's files, a tracker, pipes of starts
_KEPT_PROCESSES = 256  # the same: threads of torch, above all


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Resources that are left for this process and those below it."""

    cores: float
    memory_mb: float
    processes: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Number of sandboxes that can be alive at once, and what bounds it, for people to read."""

    sandboxes: int
    bound: str


def capacity(limits: SandboxLimits) -> Capacity:
    """Return how many sandboxes with these limits can be alive at once here; at least 1."""
    return fitting(limits, room())


def fitting(limits: SandboxLimits, left: Room) -> Capacity:
    """Return the least of what processors, memory, processes and open files allow; at least 1."""
    each_mb = _MEMORY_MB + limits.memory_mb / _AT_LIMITS
    each_processes = _PROCESSES + limits.processes / _AT_LIMITS
    bounds = (
        (int(left.cores * PER_CORE), f"{left.cores:g} processor cores"),
        # An eighth is for the trainer to grow.
        (int(left.memory_mb * (1 - 1 / _AT_LIMITS) / each_mb), f"{left.memory_mb:.0f} MiB of memory left"),
        (int((left.processes - _KEPT_PROCESSES) / each_processes), f"{left.processes} processes left"),
        ((left.open_files - _KEPT_FILES) // _OPEN_FILES, f"{left.open_files} open files left (ulimit -n)"),
    )
    number, bound = min(bounds)
    return Capacity(max(1, number), bound)


def memory_is_short(limits: SandboxLimits) -> bool:
    """Whether one more sandbox could not be filled up to its limits now without taking from what is there."""
    return available_mb() < limits.memory_mb + _MEMORY_MB


def room() -> Room:
    """Look at the machine, and at every control group above this process; of what is shared, take our part."""
    shared_by = max(1, int(os.environ.get(SHARED_BY, 1)))
    return Room(
        cores=cores() / shared_by,
        memory_mb=available_mb() / shared_by,
        processes=_processes_left() // shared_by,
        open_files=_soft_limit(resource.RLIMIT_NOFILE) - len(os.listdir("/proc/self/fd")),
    )


def cores() -> float:
    """Processors this process may run on, less where a control group gives it a share of their time only."""
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
    """Return the memory that can be had without taking any from what runs, in MiB."""
    found = [_field(Path("/proc/meminfo"), "MemAvailable:") / 1024]
    for folder, limit in _limited_groups():
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if used is not None:
            # Files read once and not since are counted, and given up when something needs the room.
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
    """Threads of this user's processes."""
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
    """What the first of these files holds; None where none is there or it says "max"."""
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return None


def _field(path: Path, name: str) -> int:
    def found() -> Iterator[int]:
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                words = line.split()
                if words and words[0] == name:
                    yield int(words[1])

    return next(found(), 0)
