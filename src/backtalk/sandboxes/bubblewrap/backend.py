"""Sandboxes of Linux namespaces, made by bubblewrap without a daemon, an image or root.

A sandbox has two layers, both made by ``bwrap``. The outer one owns what outlives a restart: a tree in memory of
limited size, the host's ``/usr`` read-only, a loopback network and a host name. Its only process is the trusted holder
(see `exec_server`). The inner one is a session: a process namespace of its own over the same files, in which the agent
cannot see the holder. `restart` ends one session and begins the next.

Files that later processes trust (``/usr``, ``/bin``, ``/lib*``, tables of the loader and of users in ``/etc``) are
mounts in the session, so that no agent can rename them and put its own in their place.

Started by root, each sandbox runs under a host uid of its own and never under uid 0, which may write much of
``/proc/sys`` also from a user namespace. ``setpriv`` changes the uid, and not ``preexec_fn`` or ``Popen(user=)``, since
these fork the trainer, which may hold many gigabytes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import BackendReport, SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap.holder import Holder
from backtalk.sandboxes.bubblewrap.layers import DISABLE_USERNS_SINCE, SIZE_SINCE
from backtalk.sandboxes.files import clean_path
from backtalk.sandboxes.machine.cgroup import watch
from backtalk.sandboxes.machine.probe import Machine, advice, next_uid, probe, require_bubblewrap, run_trial
from backtalk.sandboxes.machine.seccomp import seccomp_program
from backtalk.sandboxes.root import Root
from backtalk.sandboxes.session.sandbox import SessionSandbox

_ENTER_TIMEOUT_S = 20.0
_TRIAL_COPY_MB = 4096

_CANNOT_WITHOUT_CGROUPS = {
    "memory_of_all_processes": "no writable memory cgroup: rlimits hold for each process alone",
    "number_of_files": "no writable memory cgroup: the kernel's memory for empty files is not counted",
}


_MARK = "memfd:backtalk"  # a file that each of our sandboxes holds open


def sweep() -> int:
    """Kill bubblewrap processes that a killed trainer left waiting for ever, and return how many there were.

    The child of bubblewrap first waits to be told its user, and only then asks the kernel to end with its parent. If
    the trainer is killed before, init inherits the child. Sandboxes of living trainers have living parents, so none of
    theirs is touched.
    """
    if os.getpid() == 1:  # then init's children are our own
        return 0
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            if name != "bwrap" or int(rest.split()[1]) != 1:
                continue
            if any(_MARK in os.readlink(link) for link in (folder / "fd").iterdir()):
                os.kill(int(folder.name), signal.SIGKILL)
                count += 1
    return count


class BubblewrapSandbox(SessionSandbox):
    """A sandbox of bubblewrap. Made by `BubblewrapBackend.open`."""

    def __init__(self, holder: Holder, limits: SandboxLimits, root: Root | None = None) -> None:
        super().__init__(holder, limits)
        self._holder, self._root = holder, root

    async def start(self) -> None:
        try:
            await self._holder.ready()
        except SandboxError as error:
            raise SandboxError(f"{error}; {self._session.take_output() or 'bubblewrap said nothing'}") from error
        await super().start()
        if self._root is not None and (self._root.env or self._root.workdir):
            await self._enter(self._root)

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        if files:
            async with self._lock:
                await self._holder.put({clean_path(path): file for path, file in files.items()})

    async def get(self, path: str, *, max_bytes: int = 1 << 20) -> bytes | None:
        async with self._lock:
            return await self._holder.get(clean_path(path), max_bytes)

    async def restart(self) -> None:
        """End every process and begin a fresh process namespace, shell and environment over the same files.

        The environment is the sandbox's own: variables of a chosen root's Dockerfile hold until the first restart.
        """
        async with self._lock:
            await self._session.end()
            self._holder.add_memory()
            await self._session.begin()

    async def _enter(self, root: Root) -> None:
        """Set the variables and the folder that a Dockerfile names.

        Not repeated after a restart: by then its PATH may lead to files of the agent, in which the next session or a
        verifier must not look for programs.
        """
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in root.env.items())
        result = await self._session.exec(exports + "true", _ENTER_TIMEOUT_S, {}, root.workdir)
        if result.exit_code != 0:
            raise SandboxError(f"{root.name}: its folder or variables cannot be set: {result.output.strip()}")


class BubblewrapBackend:
    """Sandboxes by bubblewrap on this machine.

    Raises:
        SandboxUnavailable: a trial start failed; the message says what to install or to allow.
    """

    def __init__(self, *, use_cgroups: bool = True, root: Root | None = None, readable: Sequence[str] = ()) -> None:
        """Look at the machine and start one sandbox for trial. `use_cgroups` False limits by rlimits alone.

        `root` is the root file system that sandboxes start from (see `backtalk.sandboxes.images.open.open_root`); None
        is this machine's programs over an empty tree. `readable` are folders of this machine that are shown read-only,
        where no root is chosen.
        """
        self._machine = probe(use_cgroups=use_cgroups)
        require_bubblewrap(self._machine)
        watch(self._machine.cgroups)
        self._root, self._readable = root, tuple(readable)
        why_copied = self._choose_how()
        self._report = _report(self._machine, self._root, self._readable, why_copied)

    @property
    def report(self) -> BackendReport:
        return self._report

    @asynccontextmanager
    async def open(self, limits: SandboxLimits) -> AsyncGenerator[BubblewrapSandbox]:
        uids = self._machine.uid_range[:-1] or self._machine.uid_range  # the last one is for building roots
        holder = Holder(self._machine, limits, next_uid(uids), self._root, self._readable)
        sandbox = BubblewrapSandbox(holder, limits, self._root)
        try:
            await sandbox.start()
            yield sandbox
        finally:
            await sandbox.close()

    def _choose_how(self) -> str | None:
        """Try the chosen root as an overlay, else as a copy; return why it had to be a copy, or None."""
        try:
            self._trial()
            return None
        except SandboxUnavailable as error:
            if self._root is None:
                raise
            self._root = replace(self._root, how="copy")
            try:
                self._trial()
            except SandboxUnavailable:
                raise error from None
            return str(error.__cause__)

    def _trial(self) -> None:
        """Start a sandbox and run a command in it."""
        try:
            run_trial(self._try_one)
        except SandboxUnavailable as error:
            raise SandboxUnavailable(
                f"bubblewrap is installed but does not work here ({error}); {advice(self._machine)}"
            ) from error.__cause__

    async def _try_one(self) -> None:
        is_copy = self._root is not None and self._root.how == "copy"
        limits = SandboxLimits(disk_mb=_TRIAL_COPY_MB) if is_copy else SandboxLimits()
        async with self.open(limits) as sandbox:
            result = await sandbox.exec("[[ ! -w /proc/sys/kernel/core_pattern ]] && echo fine", timeout_s=10)
            if result.output != "fine\n":
                raise SandboxError(f"a trial command answered {result.output!r}, exit code {result.exit_code}")


def _files(root: Root | None) -> str:
    if root is None:
        return "private tree in memory; /usr of the host, read-only"
    programs = "its programs" if root.programs else "/usr of the host"
    over = "over" if root.how == "overlay" else "copied from"
    return f"private tree in memory {over} {root.name}; {programs}, read-only"


def _report(machine: Machine, root: Root | None, readable: Sequence[str], why_copied: str | None) -> BackendReport:
    by_group = f"cgroup v{machine.cgroups.version}"
    warnings = []
    if machine.cgroups.memory is None:
        warnings.append("no writable memory cgroup: each process is limited, but not all of a sandbox together")
    has_size = machine.bwrap_version >= SIZE_SINCE
    if not has_size:
        warnings.append("bubblewrap older than 0.7: the size of a sandbox's disk is not limited")
    if machine.bwrap_version < DISABLE_USERNS_SINCE:
        warnings.append("bubblewrap older than 0.8: commands may make user namespaces of their own")
    if machine.uid == 0 and not machine.uid_range:
        warnings.append("only root's own uid is mapped here: commands run under it")
    if seccomp_program() is None:
        warnings.append("no system call filter for this processor")
    if why_copied is not None:
        warnings.append(f"the chosen root is copied into each sandbox, within its disk, for no overlay: {why_copied}")
    uid = f"{machine.uid_range[0]} and up" if machine.uid_range else str(machine.uid)
    return BackendReport(
        name="bubblewrap",
        isolation={
            "network": "loopback only",
            "files": ", ".join((_files(root), *readable)),
            "processes": "own namespace, new at every restart",
            "user": f"1000 inside, uid {uid} outside; no capabilities, no new privileges",
            "system calls": "filtered" if seccomp_program() is not None else "not filtered",
        },
        limits={
            "memory": by_group if machine.cgroups.memory else "rlimit, each process for itself",
            "processes": f"rlimit and {by_group}" if machine.cgroups.pids else "rlimit",
            "disk": "size of the tree in memory" if has_size else "none",
            "output": "cut while reading",
        },
        warnings=tuple(warnings),
        cannot={} if machine.cgroups.memory else _CANNOT_WITHOUT_CGROUPS,
    )
