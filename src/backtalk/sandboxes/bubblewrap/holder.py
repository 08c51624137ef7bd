"""The trainer's side of the holder: start it, ask it to begin and end sessions and to move files, and end it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap.layers import (
    FIXED_FILES,
    RESERVE_BYTES,
    RESERVE_FILE,
    SESSION_FOLDERS,
    drop_argv,
    inner_argv,
    outer_argv,
)
from backtalk.sandboxes.files import pack_files
from backtalk.sandboxes.machine.cgroup import Cgroup
from backtalk.sandboxes.machine.probe import Machine
from backtalk.sandboxes.machine.seccomp import seccomp_program
from backtalk.sandboxes.root import Root
from backtalk.sandboxes.session.exec_server import (
    END_TIMEOUT_S,
    SHELL_PROGRAM,
    frames,
    holder_program,
    supervisor_program,
)
from backtalk.sandboxes.session.pipes import FrameReader, PipePair, sealed_file, with_high_number, write_all
from backtalk.sandboxes.session.shell import START_TIMEOUT_S, STOP_TIMEOUT_S

_FILES_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class _Pipes:
    """All pipes of one sandbox, and the file in memory through which content of files is passed."""

    requests: PipePair
    answers: PipePair
    info: PipePair
    commands: PipePair
    reports: PipePair
    output: PipePair
    shared: PipePair

    @classmethod
    def make(cls) -> _Pipes:
        made: list[PipePair] = []
        try:
            for reading in (False, True, True, False, True, True):
                made.append(PipePair.to_read() if reading else PipePair.to_write())
            made.append(PipePair.shared_file())
        except OSError as error:
            for pair in made:
                os.close(pair.ours)
                os.close(pair.theirs)
            raise SandboxError(f"no pipes for a sandbox: {error.strerror}; raise the limit `ulimit -n`") from error
        return cls(*made)


class Holder:
    """The outer layer of a sandbox, with its one trusted process. A `Keeper` of sessions."""

    def __init__(
        self, machine: Machine, limits: SandboxLimits, uid: int | None, root: Root | None, readable: Sequence[str]
    ) -> None:
        """Start it. `uid` is the host uid to run under, or None for our own; `root` None is the host's programs.

        Raises:
            SandboxError: the kernel refuses pipes. What else it refuses is raised by `ready`.
        """
        self._machine, self._limits, self._uid = machine, limits, uid
        self._broken = ""
        self._child_id = 0
        self._cgroup: Cgroup | None = None
        pipes = _Pipes.make()
        self.commands, self.reports, self.output = pipes.commands, pipes.reports, pipes.output
        self._requests = pipes.requests.ours
        self._shared = pipes.shared.ours
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if uid is not None:
                os.fchown(pipes.output.theirs, uid, uid)  # or opening /dev/stderr inside is refused
            self._process = self._spawn(root, readable, pipes)
            if machine.cgroups.version:
                self._cgroup = Cgroup(machine.cgroups, limits)
        except OSError as error:
            self._broken = f"a sandbox could not start: {error.strerror or error}"
        finally:
            for name in pipes.__slots__:
                os.close(getattr(pipes, name).theirs)
        self._answers = FrameReader(pipes.answers.ours)
        self._info = FrameReader(pipes.info.ours, end=b"\n")

    def _spawn(self, root: Root | None, readable: Sequence[str], pipes: _Pipes) -> subprocess.Popen[bytes]:
        supervisor_text = supervisor_program(
            processes=self._limits.processes,
            file_kib=self._limits.disk_mb << 10,
            memory_kib=0 if self._machine.cgroups.memory else self._limits.memory_mb << 10,
        )
        program = holder_program(
            FIXED_FILES, folders=SESSION_FOLDERS, reserve_file=RESERVE_FILE, reserve_bytes=RESERVE_BYTES
        )
        rules = seccomp_program()
        with contextlib.ExitStack() as stack:

            def passed(descriptor: int) -> int:
                stack.callback(os.close, descriptor)
                return descriptor

            inner_info = passed(with_high_number(os.dup(pipes.info.theirs)))  # each bwrap closes its own in its child
            # Held open by bubblewrap itself, or it dies of a broken pipe if the trainer dies during its start.
            info_reader = passed(with_high_number(os.dup(pipes.info.ours)))
            supervisor = passed(sealed_file(supervisor_text.encode()))
            shell = passed(sealed_file(SHELL_PROGRAM.encode()))
            filter_fd = None if rules is None else passed(sealed_file(rules))
            outer = outer_argv(
                *(self._machine, self._limits, self._uid),
                info_fd=pipes.info.theirs,
                filter_fd=filter_fd,
                root=root,
                readable=readable,
            )
            numbers = (pipes.commands.theirs, pipes.reports.theirs, supervisor, shell, info_reader, pipes.shared.theirs)
            return subprocess.Popen(
                [
                    *outer,
                    *("bash", "--norc", "--noprofile", "-c", program, "holder", *map(str, numbers)),
                    *inner_argv(self._machine, info_fd=inner_info, root=root),
                ],
                stdin=pipes.requests.theirs,
                stdout=pipes.answers.theirs,
                stderr=pipes.output.theirs,
                pass_fds=[*numbers, pipes.info.theirs, inner_info, *([] if filter_fd is None else [filter_fd])],
                env={"PATH": os.environ.get("PATH", "")},
                cwd="/",
                start_new_session=True,
            )

    async def ready(self) -> None:
        """Wait until it runs, and put it into its control group before it starts anything.

        Raises:
            SandboxError: it does not run, or the kernel refused a process or a control group.
        """
        self._check()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._child_id = int(json.loads(await self._info.next())["child-pid"])
                if self._cgroup is not None and self._process is not None:
                    self._cgroup.add(self._process.pid)
                    self._cgroup.add(self._child_id)
        except (SandboxError, TimeoutError, OSError, ValueError) as error:
            raise SandboxError(f"the sandbox did not start: {error}") from error

    async def begin(self, name: str) -> None:
        self._check()
        self._info.clear()
        await write_all(self._requests, frames("begin", name))

    async def end(self) -> None:
        answer = await self._ask(frames("end"), END_TIMEOUT_S + STOP_TIMEOUT_S)
        if answer == b"shut":  # no process is left that could shut it again
            await self._open_root()
            answer = await self._ask(frames("end"), STOP_TIMEOUT_S)
        if answer != b"ok":
            self._broken = answer.decode("utf-8", "replace")
            raise SandboxError(self._broken)

    async def _open_root(self) -> None:
        """Give the root folder back its permissions, which the agent took; inside, no program could start now."""
        command = [*drop_argv(self._machine, self._uid), "chmod", "755", f"/proc/{self._child_id}/root"]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        await process.wait()

    def add_memory(self) -> None:
        """Give the next session its full memory beside the files that are left, which count as memory."""
        if self._cgroup is not None:
            self._cgroup.add_memory()

    async def stop(self, tick: int, last_id: int, shell_id: int) -> bool:
        return await self._ask(frames("stop", str(tick), str(last_id), str(shell_id)), STOP_TIMEOUT_S) == b"ok"

    async def lost(self) -> int:
        while "exit-code" not in (note := json.loads(await self._info.next())):
            pass
        return int(note["exit-code"])

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        """Write files, replacing what is in the way. See `Sandbox.put`."""
        archive = pack_files(files)
        if len(archive) > (self._limits.disk_mb + 1) << 20:
            raise SandboxError(f"files of {len(archive)} bytes do not fit a disk of {self._limits.disk_mb} MiB")
        self._check()
        with _emptied(self._shared):
            os.pwrite(self._shared, archive, 0)
            answer = await self._ask(frames("put", str(len(files)), *files), _FILES_TIMEOUT_S)
        if answer != b"ok":
            raise SandboxError(f"could not write files into the sandbox: {answer.decode('utf-8', 'replace')}")

    async def get(self, path: str, max_bytes: int) -> bytes | None:
        """Read a file. See `Sandbox.get`."""
        self._check()
        with _emptied(self._shared):
            if await self._ask(frames("get", str(max_bytes + 1), path), _FILES_TIMEOUT_S) != b"file":
                return None
            content = os.pread(self._shared, os.fstat(self._shared).st_size, 0)
        if len(content) > max_bytes:
            raise SandboxError(f"{path} is larger than {max_bytes} bytes; ask for more with max_bytes")
        return content

    async def _ask(self, request: bytes, timeout_s: float) -> bytes:
        self._check()
        self._broken = "an earlier request to it was not answered"
        try:
            async with asyncio.timeout(timeout_s):
                await write_all(self._requests, request)
                answer = await self._answers.next()
        except TimeoutError as error:
            raise SandboxError(f"the sandbox gave no answer in {timeout_s:.0f} s") from error
        self._broken = ""
        return answer

    def _check(self) -> None:
        if self._broken:
            raise SandboxError(f"the sandbox is not usable: {self._broken}")

    async def close(self) -> None:
        """End every process in it and leave nothing behind. A second call does nothing."""
        if self._requests >= 0:
            self._answers.close()
            self._info.close()
            os.close(self._shared)
            os.close(self._requests)  # the holder ends everything when it reads the end
            self._requests = -1
        self._broken = "it is closed"
        until_s = time.monotonic() + _CLOSE_TIMEOUT_S
        try:
            while self._process is not None and self._process.poll() is None and time.monotonic() < until_s:
                await asyncio.sleep(0.002)
        finally:
            self._kill()

    def _kill(self) -> None:
        """Kill what is left. Does not wait on the event loop, so that a cancellation cannot cut it short."""
        if self._process is not None and self._process.poll() is None:
            # Its process 1 first: if bubblewrap's outer process ended before, init would inherit it.
            for process_id in [self._child_id] if self._child_id else _stopped(self._process.pid):
                with contextlib.suppress(OSError):
                    os.kill(process_id, signal.SIGKILL)
            try:
                self._process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._cgroup is not None:
            self._cgroup.remove_soon()
            self._cgroup = None


def _stopped(process_id: int) -> list[int]:
    """Stop a process, so that it starts no other, and return the ids of its children and its own."""
    try:
        os.kill(process_id, signal.SIGSTOP)
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    except OSError:
        children = []
    return [*map(int, children), process_id]


@contextlib.contextmanager
def _emptied(shared: int) -> Iterator[None]:
    """Empty a shared file on exit, which gives its memory back."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # closed meanwhile
            os.ftruncate(shared, 0)
