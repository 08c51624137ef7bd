"""Sandbox backend without isolation: plain processes in a temporary folder. Used only when asked for by name.

It implements the same protocol, with time limits and the output limit, so that code can be tried on a machine without
namespaces. It isolates nothing: a command can read and delete what you can, and reach the network. Paths are not
mapped: `put` and `get` see ``/app/x`` as ``<temporary folder>/app/x``, commands see the real ``/app/x``. Write tasks
for it with relative paths; commands start in ``<temporary folder>/home/agent``.

Started by root, commands still run under another uid if ``setpriv`` is installed: a model that writes ``kill -9 -1``
ends its own processes and not all of the machine's. Started by an ordinary user, it ends all of yours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import BackendReport, SandboxFile, SandboxLimits
from backtalk.sandboxes.files import clean_path, read_regular, remove_tree
from backtalk.sandboxes.machine.probe import next_uid, probe
from backtalk.sandboxes.session.exec_server import SHELL_PROGRAM, supervisor_program
from backtalk.sandboxes.session.pipes import PipePair, sealed_file
from backtalk.sandboxes.session.sandbox import SessionSandbox

_MARK = "BACKTALK_UNSAFE_SANDBOX"  # in the environment of all its processes, by which they are found
_END_TIMEOUT_S = 5.0
_WARNING = (
    "UNSAFE: commands run unconfined: they can read and delete your files, end your processes and use the network. "
    "Install bubblewrap and use sandbox 'auto' for anything a model writes."
)


class _ProcessKeeper:
    """A `Keeper` of plain processes, which are found by a mark in their environment."""

    def __init__(self, folder: Path, limits: SandboxLimits, drop: list[str]) -> None:
        self._folder = folder
        self._limits = limits
        self._drop = drop
        self._mark = secrets.token_hex(8)
        self._supervisor: subprocess.Popen[bytes] | None = None
        self.commands, self.reports, self.output = PipePair.to_write(), PipePair.to_read(), PipePair.to_read()

    async def begin(self, name: str) -> None:
        home = self._folder / "home" / "agent"
        commands, reports = self.commands.theirs, self.reports.theirs
        program = supervisor_program(file_kib=self._limits.disk_mb << 10)
        shell = sealed_file(SHELL_PROGRAM.encode())
        text = f"exec 3<&{commands} 4>&{reports} 6<&{shell} 7<<<{name}\n"
        text += f"exec {commands}<&- {reports}>&- {shell}<&-\n{program}"
        path = {"PATH": os.environ["PATH"]} if "PATH" in os.environ else {}
        env = {**path, "HOME": str(home), "USER": "agent", "LANG": "C.UTF-8", "TZ": "UTC", "TERM": "dumb"}
        try:
            self._supervisor = subprocess.Popen(
                [*self._drop, "bash", "-s"],
                stdin=subprocess.PIPE,
                stdout=self.output.theirs,
                stderr=self.output.theirs,
                pass_fds=(commands, reports, shell),
                env={**env, _MARK: self._mark},
                cwd=home,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"bash could not be started: {error.strerror}") from error
        finally:
            os.close(shell)
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.write(text.encode())
        self._supervisor.stdin.close()

    async def end(self) -> None:
        left = await self._kill(lambda _id, _tick: True)
        if self._supervisor is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._supervisor.pid, signal.SIGKILL)
            self._supervisor.wait()
        if left:
            raise SandboxError(f"{left} processes of the sandbox do not end")

    async def stop(self, tick: int, last_id: int, shell_id: int) -> bool:
        def is_new(process_id: int, start_tick: int) -> bool:
            return process_id == shell_id or start_tick > tick or (start_tick == tick and process_id > last_id)

        return not await self._kill(is_new) and Path("/proc/self/stat").exists()

    async def lost(self) -> int:
        while self._supervisor is None or self._supervisor.poll() is None:
            await asyncio.sleep(0.05)
        return 128 - self._supervisor.returncode if self._supervisor.returncode < 0 else self._supervisor.returncode

    async def _kill(self, chosen: Callable[[int, int], bool]) -> int:
        """Kill the sandbox's processes that are `chosen` by id and start tick; return how many do not end."""
        until_s = time.monotonic() + _END_TIMEOUT_S
        while left := [process_id for process_id, tick in self._processes() if chosen(process_id, tick)]:
            for process_id in left:
                with contextlib.suppress(OSError):
                    os.kill(process_id, signal.SIGKILL)
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(0.005)
        return len(left)

    def _processes(self) -> Iterator[tuple[int, int]]:
        """Yield id and start tick of every living process with the mark."""
        mark = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                yield int(folder.name), int(fields[19])

    async def close(self) -> None:
        try:
            await self.end()
        finally:
            for pair in (self.commands, self.reports, self.output):
                os.close(pair.theirs)


class UnsafeSandbox(SessionSandbox):
    """A sandbox that is a temporary folder and a shell. Made by `UnsafeBackend.open`."""

    def __init__(self, folder: Path, limits: SandboxLimits, uid: int | None) -> None:
        self._folder, self._uid = folder, uid
        self._make_folder(folder / "home" / "agent")
        drop = [] if uid is None else ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
        keeper = _ProcessKeeper(folder, limits, drop)
        if uid is not None:
            os.fchown(keeper.output.theirs, uid, uid)
        super().__init__(keeper, limits)

    def _place(self, cwd: str) -> str:
        return f"{self._folder}{posixpath.normpath(f'/{cwd}')}"

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        for path, file in files.items():
            target = self._host_path(path)
            try:
                self._make_folder(target.parent)
                if target.is_dir() and not target.is_symlink():
                    remove_tree(target)
                target.unlink(missing_ok=True)
                target.write_bytes(file.content)
                target.chmod(file.mode & 0o777)
                self._give_to_agent(target)
                if file.mtime is not None:
                    os.utime(target, (file.mtime, file.mtime))
            except OSError as error:
                raise SandboxError(f"could not write {path}: {error.strerror}") from error

    async def get(self, path: str, *, max_bytes: int = 1 << 20) -> bytes | None:
        target = self._host_path(path)
        try:
            self._refuse_links(target.parent)
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, SandboxError):
            return None
        return read_regular(descriptor, path, max_bytes)

    def _make_folder(self, folder: Path) -> None:
        for part in (*reversed(folder.parents), folder):
            if part.is_relative_to(self._folder):
                self._refuse_links(part)
                part.mkdir(exist_ok=True)
                self._give_to_agent(part)

    def _give_to_agent(self, path: Path) -> None:
        if self._uid is not None:
            os.chown(path, self._uid, self._uid, follow_symlinks=False)

    def _host_path(self, path: str) -> Path:
        return self._folder / clean_path(path).lstrip("/")

    def _refuse_links(self, folder: Path) -> None:
        if not folder.resolve().is_relative_to(self._folder):
            raise SandboxError(f"{folder} leads out of the sandbox's folder")


class UnsafeBackend:
    """A sandbox backend that isolates nothing; see the module.

    Raises:
        SandboxUnavailable: started by root without ``setpriv``, where a model's `kill -9 -1` would end the machine.
    """

    def __init__(self) -> None:
        machine = probe(use_cgroups=False)
        if machine.uid == 0 and machine.setpriv is None:
            raise SandboxUnavailable(
                "sandbox 'unsafe' would run commands as root, who may end every process of this machine; "
                "install setpriv (apt install util-linux) or run as an ordinary user"
            )
        self._uids = machine.uid_range if machine.setpriv is not None else range(0)

    @property
    def report(self) -> BackendReport:
        user = f"uid {self._uids[0]} and up" if self._uids else f"uid {os.getuid()}, yours"
        return BackendReport(
            name="unsafe",
            isolation={"network": "none", "files": "none", "processes": "none", "user": user},
            limits={"memory": "none", "processes": "none", "disk": "size of one file", "output": "cut while reading"},
            warnings=(_WARNING,),
        )

    @asynccontextmanager
    async def open(self, limits: SandboxLimits) -> AsyncGenerator[UnsafeSandbox]:
        folder = Path(tempfile.mkdtemp(prefix="backtalk-unsafe-")).resolve()
        try:
            sandbox = UnsafeSandbox(folder, limits, next_uid(self._uids))
            try:
                await sandbox.start()
                yield sandbox
            finally:
                await sandbox.close()
        finally:
            remove_tree(folder)
