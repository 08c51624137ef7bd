"""Make control groups that limit memory and processes of sandboxes, where this machine allows it."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from backtalk.sandboxes.base import SandboxLimits

_NAME = "backtalk"
_SPARE_PROCESSES = 32  # for the holder and its helpers; the agent reaches its own limit first
_TOKEN = secrets.token_hex(4)  # trainers in different containers may have the same process id
_REMOVE_TIMEOUT_S = 2.0
_WATCHER = """read -r; for try in {1..200}; do left=; for prefix; do for group in "$prefix"*; do
  [[ -d $group ]] && { rmdir "$group" || left=1; }; done; done; [[ $left ]] || break; sleep 0.05; done"""
_watched: dict[int, CgroupParents] = {}
_counter = itertools.count()


@dataclass(frozen=True, slots=True)
class CgroupParents:
    """Folders in which groups can be made: one for everything in version 2, one for each controller in version 1."""

    version: int  # 0: there are none
    memory: Path | None = None
    pids: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the distinct folders."""
        return tuple(dict.fromkeys(folder for folder in (self.memory, self.pids) if folder is not None))


class Cgroup:
    """The control groups of one sandbox."""

    def __init__(self, parents: CgroupParents, limits: SandboxLimits) -> None:
        """Make the groups and set the limits; OSError where the kernel refuses."""
        name = f"{_NAME}-{os.getpid()}-{_TOKEN}-{next(_counter)}"
        self._folders = [folder / name for folder in parents.folders]
        self._memory = None if parents.memory is None else parents.memory / name
        self._version = parents.version
        self._memory_bytes = limits.memory_mb << 20
        try:
            for folder in self._folders:
                folder.mkdir()
            self._limit_memory(self._memory_bytes)
            if parents.pids is not None:
                (parents.pids / name / "pids.max").write_text(str(limits.processes + _SPARE_PROCESSES))
        except OSError:
            self.remove()
            raise

    def _limit_memory(self, size_bytes: int) -> None:
        """Limit memory and swap together. In version 1 the limit of memory may at no moment exceed that of both."""
        if self._memory is None:
            return
        if self._version == 2:
            (self._memory / "memory.max").write_text(str(size_bytes))
            with contextlib.suppress(OSError):
                (self._memory / "memory.swap.max").write_text("0")
            return
        for name in ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            with contextlib.suppress(OSError) if "memsw" in name else contextlib.nullcontext():
                (self._memory / name).write_text(str(size_bytes))

    def add_memory(self) -> None:
        """Raise the limit by what is in use now, which is files that ended processes left in memory."""
        if self._memory is not None:
            name = "memory.current" if self._version == 2 else "memory.usage_in_bytes"
            with contextlib.suppress(OSError):
                self._limit_memory(self._memory_bytes + int((self._memory / name).read_text()))

    def add(self, process_id: int) -> None:
        """Move a process into the groups, and with it all that it starts from now on."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(process_id))

    def remove(self) -> bool:
        """Remove the groups; return False where a process is still in one."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._folders = [folder for folder in self._folders if folder.exists()]
        return not self._folders

    def remove_soon(self) -> None:
        """Remove the groups as soon as they are empty: the kernel takes some milliseconds to see a process leave."""
        until_s = time.monotonic() + _REMOVE_TIMEOUT_S
        while not self.remove() and time.monotonic() < until_s:
            time.sleep(0.002)


def find_parents() -> CgroupParents:
    """Find where groups can be made. Each folder is tried with a process: a writable one may still refuse it."""
    for folder in _groups_of(""):
        if _works(parents := CgroupParents(2, memory=folder, pids=folder)):
            return parents
    found: dict[str, Path] = {}
    for controller in ("memory", "pids"):
        for folder in _groups_of(controller):
            if _works(CgroupParents(1, **{controller: folder})):
                found[controller] = folder
                break
    return CgroupParents(1, **found) if found else CgroupParents(0)


@cache
def own_groups(controller: str) -> tuple[Path, ...]:
    """Return the visible groups that this process began in: its own first, then those above it."""
    return tuple(_groups_of(controller) or _groups_of(""))


def _groups_of(controller: str) -> list[Path]:
    own, mounts = _own_paths(), _mounts()
    return _upwards(*mounts[controller], own[controller]) if controller in own and controller in mounts else []


def watch(parents: CgroupParents) -> None:
    """Have our groups removed when this process ends, however it ends: the kernel keeps an empty group for ever.

    A small process in a session of its own waits for the end of a pipe that only this process holds open.
    """
    if not parents.folders or _watched.get(os.getpid()) == parents:
        return
    _watched[os.getpid()] = parents
    prefixes = [str(folder / f"{_NAME}-{os.getpid()}-{_TOKEN}-") for folder in parents.folders]
    reading, _kept_open = os.pipe()
    try:  # bash ends at once and leaves the watcher to init, so that we have no child to wait for
        command = ["bash", "-c", f"( {_WATCHER} ) <&0 &", "backtalk-watcher", *prefixes]
        subprocess.run(command, stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                       start_new_session=True, check=False)  # fmt: skip
    finally:
        os.close(reading)


def _upwards(mount: Path, root: str, own: str) -> list[Path]:
    """Return our own group, then those above it: in version 2 a group that has processes can have no children."""
    relative = os.path.relpath(own, root) if own.startswith(root) else "."
    folder = (mount / relative).resolve()
    if not folder.is_relative_to(mount):
        folder = mount
    return [place for place in (folder, *folder.parents) if place.is_relative_to(mount)]


def _works(parents: CgroupParents) -> bool:
    try:
        group = Cgroup(parents, SandboxLimits(memory_mb=64, processes=8))
    except OSError:
        return False
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            group.add(child.pid)
        return True
    except OSError:
        return False
    finally:
        group.remove_soon()


def _own_paths() -> dict[str, str]:
    """Return the path of our group by the name of its controller, which is "" for version 2."""
    paths = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update({controller: path for controller in controllers.split(",")})
    return paths


def _mounts() -> dict[str, tuple[Path, str]]:
    """Return the mount point and the path of the group mounted there, by controller ("" for version 2)."""
    mounts: dict[str, tuple[Path, str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            root, point = before.split(" ")[3:5]
            kind, _, options = after.split(" ", 2)
            if kind == "cgroup2":
                mounts.setdefault("", (Path(point), root))
            elif kind == "cgroup":
                for option in options.split(","):
                    mounts.setdefault(option.strip(), (Path(point), root))
    return mounts
