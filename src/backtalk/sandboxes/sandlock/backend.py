"""Sandboxes by Landlock and seccomp, through the package ``sandlock``, where bubblewrap cannot run.

A sandbox is a folder of this machine that its commands see as the root folder, beside this machine's programs. sandlock
answers the session's system calls for paths; Landlock and filters in the kernel hold, whatever it answers (see
`guard`). Weaker than namespaces, and slower: what it cannot do is in the report and in docs/security.md.

By itself sandlock 0.9 lets a command under such a root connect to any socket file of the machine, Docker's too. Here no
command can make a socket at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import HOME, BackendReport, SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap.layers import FIXED_FILES, IMAGE_FOLDERS, SESSION_FOLDERS
from backtalk.sandboxes.files import clean_path, remove_tree
from backtalk.sandboxes.machine.probe import next_uid, probe, run_trial
from backtalk.sandboxes.machine.seccomp import seccomp_program
from backtalk.sandboxes.sandlock.files import RootedFiles, lock_folder, remove_orphans
from backtalk.sandboxes.sandlock.keeper import (
    PROGRAMS,
    SandlockKeeper,
    program_folders,
    program_loader,
    write_alternatives,
)
from backtalk.sandboxes.session.sandbox import SessionSandbox

_SHARED = ("/tmp", "/var/tmp", "/run/shm")
_PREFIX = "backtalk-sandlock-"
_INSTALL = "pip install 'backtalk[sandlock]'"
_WARNINGS = (
    "SANDLOCK isolates less than bubblewrap: no namespaces. Sandboxes share this machine's process numbers, and its "
    "disk and memory are kept by limits of each process and by counting, not by the kernel for a sandbox as a whole.",
    "the disk is limited for each file, and for files that are put; a command can fill this machine's disk with many",
    "no socket can be made: tasks with a server on loopback do not work; nor do `<(...)`, mkfifo, and `tar -cf FILE` "
    "(`tar -c >FILE` does), whose system calls sandlock does not answer",
)
_NO_SOCKETS = "no socket can be made"
_NO_REOPENING = "sandlock refuses to open a pipe anew by its number"
_NO_DISK = "files are not counted together; a file has a limit, and what is put"
_CANNOT = {
    "local_server": _NO_SOCKETS,
    "network_of_its_own": _NO_SOCKETS,
    "non_blocking_output": _NO_REOPENING,
    "writable_places": f"{_NO_REOPENING}: /dev/stdout and /dev/stderr (>&2 works)",
    "disk": _NO_DISK,
    "too_large_to_put": _NO_DISK,
    "own_namespaces": "there are none",
    "devices": "the names in /dev are visible; null, zero, full and random can be opened, and no other",
    "trusted_files": "the agent can replace them for its own session; the next one finds them written anew",
}


# Process ids are the machine's here and wrap around, so that only the clock tells which processes a command started:
# each command waits for a clock tick of its own.
_TICK_S = 1.2 / os.sysconf("SC_CLK_TCK")


class SandlockSandbox(SessionSandbox):
    """A sandbox that is a folder, and a shell that sees it as its root. Made by `SandlockBackend.open`."""

    settle_s = _TICK_S

    def __init__(self, folder: Path, limits: SandboxLimits, uid: int | None, readable: Sequence[str] = ()) -> None:
        self._root, self._uid, self._limits, self._readable = folder / "root", uid, limits, readable
        self._root.mkdir(mode=0o755)
        (folder / "trash").mkdir(mode=0o700)
        write_alternatives(folder / "alternatives")
        if uid is not None:
            os.chown(self._root, uid, uid)
        self._files = RootedFiles(self._root, folder / "trash", uid)
        self._guarded = SandlockKeeper(folder, limits, uid, self._prepare, readable)
        super().__init__(self._guarded, limits)

    async def start(self) -> None:
        for path in IMAGE_FOLDERS:
            self._files.make_folder(path)
        await super().start()

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        wanted = {clean_path(path): file for path, file in files.items()}
        for path in wanted:
            if path.startswith(tuple(f"{folder}/" for folder in PROGRAMS)):
                raise SandboxError(f"could not write {path}: it is among this machine's programs, which are read-only")
        async with self._lock:
            self._check()
            self._files.put(wanted, max_bytes=self._limits.disk_mb << 20)

    async def get(self, path: str, *, max_bytes: int = 1 << 20) -> bytes | None:
        async with self._lock:
            self._check()
            return self._files.get(clean_path(path), max_bytes)

    def _check(self) -> None:
        if self._guarded.closed:
            raise SandboxError("the sandbox is closed")

    def _prepare(self) -> None:
        """Write anew what the next session's programs trust, while no process of the agent's is left."""
        for path in ("/", "/dev", "/proc", *program_folders(), *self._readable, *SESSION_FOLDERS):
            self._files.make_folder(path, 0o1777 if path in _SHARED else 0o755)
        uid = os.getuid() if self._uid is None else self._uid
        for path, text in FIXED_FILES.items():
            text = text.replace(":1000:1000:", f":{uid}:{uid}:").replace(":1000:", f":{uid}:")
            self._files.write(path, SandboxFile(text.encode()))
        loader = program_loader()  # sandlock looks for it under the root alone, not where the machine's programs are
        self._files.write(str(loader), SandboxFile(loader.read_bytes(), mode=0o755))


class SandlockBackend:
    """A sandbox backend by Landlock and seccomp on this machine.

    Raises:
        SandboxUnavailable: sandlock is not installed, or a trial start failed; the message says what to do.
    """

    def __init__(self, *, fallback_reason: str = "", readable: Sequence[str] = ()) -> None:
        """Probe the machine and start one sandbox for trial, which must deny what the report says is denied.

        `fallback_reason` is why a backend that isolates more is not in force, for the report.
        `readable` are folders of this machine that are shown read-only, beside its programs.
        """
        self._fallback_reason, self._readable = fallback_reason, tuple(readable)
        if find_spec("sandlock") is None:
            raise SandboxUnavailable(f"sandlock is not installed; type: {_INSTALL} (it needs Linux 6.12)")
        if seccomp_program(sockets=False) is None:
            raise SandboxUnavailable("there is no filter for this processor's system calls, and so none for sockets")
        remove_orphans(_PREFIX)
        machine = probe(use_cgroups=False)
        if machine.uid == 0 and not machine.uid_range:
            raise SandboxUnavailable("only root's own uid is mapped here, and sandlock would run commands under it")
        self._uids = machine.uid_range
        try:
            run_trial(self._try_one)
        except SandboxUnavailable as error:
            raise SandboxUnavailable(f"sandlock is installed but does not work here ({error})") from error

    @property
    def report(self) -> BackendReport:
        uid = f"{self._uids[0]} and up" if self._uids else f"{os.getuid()}, yours"
        return BackendReport(
            name="sandlock",
            isolation={
                "network": "none: no sockets",
                "files": "a folder of this machine; its programs, read-only (Landlock)",
                "processes": "cannot be signalled or traced from inside (Landlock); no namespace",
                "user": f"uid {uid}; no new privileges",
                "system calls": "filtered",
            },
            limits={
                "memory": "counted by sandlock, and an rlimit for each process",
                "processes": "counted by sandlock",
                "disk": "size of one file, and of files that are put",
                "output": "cut while reading",
            },
            warnings=(*([self._fallback_reason] if self._fallback_reason else []), *_WARNINGS),
            cannot=_CANNOT if self._uids else {**_CANNOT, "capabilities": "only root could empty the bounding set"},
        )

    @asynccontextmanager
    async def open(self, limits: SandboxLimits) -> AsyncGenerator[SandlockSandbox]:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
        lock = lock_folder(folder)
        folder.chmod(0o711)  # another uid passes through to its root
        try:
            sandbox = SandlockSandbox(folder, limits, next_uid(self._uids), self._readable)
            try:
                await sandbox.start()
                yield sandbox
            finally:
                await sandbox.close()
        finally:
            remove_tree(folder)
            if lock is not None:
                os.close(lock)

    async def _try_one(self) -> None:
        """Start a sandbox; fail if its commands reach a readable file of the machine, the trainer or the network."""
        with tempfile.NamedTemporaryFile(prefix="backtalk-") as secret:
            os.fchmod(secret.fileno(), 0o644)
            attacks = (f"cat {secret.name}", f"kill -0 {os.getpid()}", "exec 9<>/dev/tcp/127.0.0.1/9", "ls /proc/1/")
            command = "pwd; " + "; ".join(f"({attack}) >/dev/null 2>&1 && echo '{attack}'" for attack in attacks)
            async with self.open(SandboxLimits()) as sandbox:
                result = await sandbox.exec(f"{command}; true", timeout_s=20)
        if (result.output, result.exit_code) != (f"{HOME}\n", 0):
            raise SandboxError(f"a trial command answered {result.output!r}, exit code {result.exit_code}")
