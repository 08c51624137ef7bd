"""Start, ask and end the guard of a sandlock session, from the trainer's side; decide what a session may use."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import HOME, SandboxLimits
from backtalk.sandboxes.bubblewrap.layers import ENVIRONMENT
from backtalk.sandboxes.machine.seccomp import seccomp_program
from backtalk.sandboxes.session.exec_server import SHELL_PROGRAM
from backtalk.sandboxes.session.pipes import FrameReader, PipePair, write_all
from backtalk.sandboxes.session.shell import START_TIMEOUT_S, STOP_TIMEOUT_S

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_CODE_OF_ETC = ("alternatives", "perl", "python3*", "java*")  # folders of /etc that programs look into for code
_ALTERNATIVES = "/usr/local/sbin"  # first on the PATH
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
GUARD = Path(__file__).with_name("guard.py")
_SPARE_PROCESSES = 2  # the supervisor and the shell
_END_TIMEOUT_S = 40.0
_OPEN_FILES = 4096

# As in exec_server, but for the numbers of files: sandlock passes 0 to 2 on and no others, and refuses to open one of
# them anew. 2 is for reports, because sandlock itself writes there (that it may make no socket), without a NUL.
# $1 is the session's name, $2 the shell's program.
_SUPERVISOR = r"""
exec 3<&0 4>&2 5>&1 </dev/null >/dev/null 2>/dev/null
printf '\0' >&4
while IFS= read -r -d '' -u 3 frame; do
  [[ $frame == "start:$1:"* ]] || continue
  bash -c "$2"
  printf 'exit %s %s\0' "${frame#start:*:}" "$?" >&4
done
"""


class SandlockKeeper:
    """A `Keeper` of sandlock sessions, each with a guard of its own."""

    def __init__(
        self,
        folder: Path,
        limits: SandboxLimits,
        uid: int | None,
        prepare: Callable[[], None],
        readable: Sequence[str] = (),
    ) -> None:
        """Make the session's pipes; the guard starts with `begin`.

        `folder` holds the sandbox's ``root`` and ``alternatives``; `prepare` makes the files ready before each session;
        `readable` are folders shown read-only.
        """
        self._folder, self._limits, self._uid = folder, limits, uid
        self._prepare, self._readable = prepare, readable
        self.commands, self.reports, self.output = PipePair.to_write(), PipePair.to_read(), PipePair.to_read()
        self._guard: subprocess.Popen[bytes] | None = None
        self._requests = -1
        self._answers: FrameReader | None = None
        self._lost: asyncio.Future[int] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._replies: asyncio.Queue[str] = asyncio.Queue()
        self.closed = False

    async def begin(self, name: str) -> None:
        if self.closed:
            raise SandboxError("the sandbox is closed")
        self._prepare()
        requests, answers = PipePair.to_write(), PipePair.to_read()
        settings = {
            **_policy(self._folder, self._limits, self._readable),
            "uid": self._uid,
            "command": ["/bin/bash", "-c", _supervisor(self._limits), "supervisor", name, _SHELL],
            "requests": requests.theirs,
            "answers": answers.theirs,
        }
        self._requests = requests.ours
        self._answers, self._lost = FrameReader(answers.ours), asyncio.get_running_loop().create_future()
        self._replies = asyncio.Queue()
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), json.dumps(settings)],
                stdin=self.commands.theirs,
                stdout=self.output.theirs,
                stderr=self.reports.theirs,
                pass_fds=(requests.theirs, answers.theirs),
                env={"PATH": os.environ.get("PATH", "")},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"sandlock's guard could not be started: {error.strerror}") from error
        finally:
            os.close(requests.theirs)
            os.close(answers.theirs)
        self._reading = asyncio.ensure_future(self._read(self._answers, self._lost))
        if (answer := await self._answer(START_TIMEOUT_S)) != "ready":
            raise SandboxError(f"sandlock's guard did not start: {answer}")

    async def _read(self, answers: FrameReader, lost: asyncio.Future[int]) -> None:
        """Read the guard's messages: answers to requests, and the exit code of a session that ended."""
        with contextlib.suppress(SandboxError):
            while True:
                text = (await answers.next()).decode("utf-8", "replace")
                kind, _, rest = text.partition(" ")
                if kind != "lost":
                    self._replies.put_nowait(text)
                elif not lost.done():
                    lost.set_result(int(rest))
        self._replies.put_nowait("gone")
        if not lost.done():
            lost.set_result(137)

    async def _ask(self, *words: str, timeout_s: float) -> str:
        """Ask the guard and return its answer; skip answers to earlier requests that were given up."""
        number = secrets.token_hex(4)
        until_s = time.monotonic() + timeout_s
        with contextlib.suppress(SandboxError):
            await write_all(self._requests, " ".join((number, *words)).encode() + b"\n")
        while True:
            answer = await self._answer(until_s - time.monotonic())
            request, _, text = answer.partition(" ")
            if request == number:
                return text
            if answer in ("gone", "no answer"):
                return answer

    async def _answer(self, timeout_s: float) -> str:
        """Return the guard's next message; "no answer" after the time-out."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._replies.get()
        return "no answer"

    async def stop(self, tick: int, last_id: int, shell_id: int) -> bool:
        return await self._ask("stop", str(tick), str(shell_id), timeout_s=STOP_TIMEOUT_S) == "ok"

    async def lost(self) -> int:
        assert self._lost is not None
        return await asyncio.shield(self._lost)

    async def end(self) -> None:
        if self._guard is None:
            return
        answer = await self._ask("end", timeout_s=_END_TIMEOUT_S)
        await self._dismiss()
        if answer == "gone" and self._uid is not None:  # the guard was killed; the session's processes have this uid
            answer = "ok" if await _end_all_of(self._uid) else answer
        if answer != "ok":
            self.closed = True
            raise SandboxError(f"not every process of the sandbox could be ended ({answer})")

    async def _dismiss(self) -> None:
        """Close the guard's requests, on which it ends all that is left and itself, and wait for it."""
        guard, self._guard = self._guard, None
        if self._requests >= 0:
            os.close(self._requests)
            self._requests = -1
        try:
            while guard is not None and guard.poll() is None:
                await asyncio.sleep(0.005)
        finally:
            if guard is not None and guard.poll() is None:
                guard.wait()  # it ends by itself once its requests are closed
            if self._reading is not None:
                self._reading.cancel()
            if self._answers is not None:
                self._answers.close()
                self._answers = None

    async def close(self) -> None:
        """End every process and close the pipes' ends that the session had."""
        if self.closed and self._guard is None and self.commands.theirs < 0:
            return
        self.closed = True
        killed = self._guard is not None and self._guard.poll() is not None
        try:
            await self._dismiss()
            if killed and self._uid is not None:
                await _end_all_of(self._uid)
        finally:
            for pair in (self.commands, self.reports, self.output):
                os.close(pair.theirs)


async def _end_all_of(uid: int) -> bool:
    """Kill every process of a uid that one sandbox alone has; return whether none is left."""
    until_s = time.monotonic() + _END_TIMEOUT_S
    while left := [folder for folder in Path("/proc").glob("[0-9]*") if _is_alive(folder, uid)]:
        if time.monotonic() > until_s:
            return False
        for folder in left:
            with contextlib.suppress(OSError):
                os.kill(int(folder.name), signal.SIGKILL)
        await asyncio.sleep(0.005)
    return True


def _is_alive(folder: Path, uid: int) -> bool:
    with contextlib.suppress(OSError):
        return f"\nUid:\t{uid}\t" in (text := (folder / "status").read_text()) and "\nState:\tZ" not in text
    return False


_SHELL = SHELL_PROGRAM.replace(">/dev/fd/5", ">&5")


def _supervisor(limits: SandboxLimits) -> str:
    memory_kib = limits.memory_mb << 10
    wanted = (("-c", 0), ("-f", limits.disk_mb << 10), ("-d", memory_kib), ("-v", 4 * memory_kib))
    return "\n".join(f"ulimit {flag} {value}" for flag, value in wanted) + _SUPERVISOR


def _policy(folder: Path, limits: SandboxLimits, readable: Sequence[str]) -> dict[str, Any]:
    """Return the guard's settings: packages, filter, its own Landlock domain, and the session's narrower one."""
    rules = seccomp_program(sockets=False)
    assert rules is not None  # the backend refuses such a machine
    root, alternatives = f"{folder}/root", f"{folder}/alternatives"
    of_etc = sorted(str(path) for pattern in _CODE_OF_ETC for path in Path("/etc").glob(pattern))
    code = [*program_folders(), *readable, *of_etc]
    devices = {f"/dev/{name}" for name in os.listdir("/dev")} - {*_DEVICES, "/dev/shm"}
    return {
        "packages": _packages(),
        "filter": base64.b64encode(rules).decode(),
        "domain": {"fs_readable": [*code, alternatives, "/dev"], "fs_writable": [root, "/proc", *_DEVICES]},
        "sandbox": {
            "chroot": root,
            "fs_mount_ro": {**{path: path for path in code}, _ALTERNATIVES: alternatives, "/proc": "/proc"},
            "fs_mount": {"/dev": "/dev", "/dev/shm": f"{root}/run/shm"},
            "fs_readable": ["/", *code, "/proc"],
            "fs_writable": ["/", "/dev/shm", *_DEVICES],
            "fs_denied": sorted(devices),
            "clean_env": True,
            "env": ENVIRONMENT,
            "cwd": HOME,
            "name": "box",
            "max_memory": limits.memory_mb << 20,
            "max_processes": limits.processes + _SPARE_PROCESSES,
            "max_open_files": _OPEN_FILES,
        },
    }


def program_folders() -> list[str]:
    """Return the folders of this machine's programs."""
    return [path for path in PROGRAMS if os.path.isdir(path)]


def write_alternatives(folder: Path) -> None:
    """Write scripts that start the programs behind the links of /etc/alternatives (awk, on many machines).

    sandlock resolves a link within the folder it mounted, and does not find one that leads from /usr to /etc and back.
    """
    folder.mkdir(mode=0o755)
    if os.path.isdir(_ALTERNATIVES) and os.listdir(_ALTERNATIVES):
        return  # the scripts would hide this machine's own programs there
    for link in Path("/etc/alternatives").glob("*"):
        program = link.resolve()
        if program.is_relative_to("/usr") and program.is_file() and os.access(program, os.X_OK):
            script = folder / link.name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(program))} "$@"\n')
            script.chmod(0o755)


def _packages() -> str:
    found = find_spec("sandlock")
    assert found is not None and found.origin is not None
    return str(Path(found.origin).parent.parent)


@cache
def program_loader() -> Path:
    """Return the loader (ld-linux, ld-musl) that this machine's programs name.

    Raises:
        SandboxUnavailable: bash names none.
    """
    content = Path("/bin/bash").read_bytes()
    found = content.find(b"/ld-", 0, 65_536)
    begin = content.rfind(b"\0", 0, found) + 1
    path = content[begin : content.find(b"\0", found)].decode("utf-8", "replace")
    if found < 0 or not path.startswith("/") or not os.path.isfile(path):
        raise SandboxUnavailable(
            "/bin/bash names no program loader, which sandlock needs; install a dynamically linked bash"
        )
    return Path(path)
