"""A sandbox in a Harbor environment, which runs each command in a new shell.

The session's state (folder, variables, functions) is carried from one command to the next in files inside.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import logging
import math
import secrets
import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import HOME, NO_ENV, ExecResult, SandboxFile, SandboxLimits
from backtalk.sandboxes.files import clean_path, pack_files
from backtalk.sandboxes.session.exec_server import command_text

if TYPE_CHECKING:
    from harbor.environments.base import BaseEnvironment  # pyright: ignore[reportMissingImports]

_OVERHEAD_S = 20.0  # of the environment's own work around a command
_FILES_TIMEOUT_S = 120.0
_MAX_ARGUMENT = 100_000  # bytes of one argument that every Linux accepts

# Run one command. $1 is the session's folder, $2 the time limit in seconds, $3 bytes of output to keep, $4 MiB of one
# file, $5 processes, $6 the command (empty: it is in the file "command"). Output goes through its own pipe, so that no
# background job holds the environment's open; its reader keeps the first bytes, counts the rest, and reads as long
# as there is a writer. After a time-out, processes that began after this program and are not its own are killed.
_RUN = r"""
cd "$1" || exit 125
rm -f pipe kept dropped; mkfifo -m 600 pipe || exit 125
[[ -n $6 ]] && printf %s "$6" >command
: >kept; [[ -p ended ]] || mkfifo -m 600 ended; exec 9<>ended
unbuffered=; [[ -x /usr/bin/stdbuf ]] && unbuffered='stdbuf -o0'
{ $unbuffered head -c "$3" >kept; wc -c >dropped; echo >&9; } <pipe >/dev/null 2>&1 &
reader=$! SECONDS=0
timeout -s KILL "$2" bash -s "$1" "$4" "$5" <shell >pipe 2>&1 9>&-
code=$? bytes=0
if (( code == 137 && SECONDS >= ${2%.*} )); then
  read -r line </proc/$$/stat; mine=(${line##*) })
  for process in /proc/[0-9]*; do
    read -r line <"$process/stat" && theirs=(${line##*) }) || continue
    (( theirs[19] < mine[19] || theirs[1] == $$ || theirs[1] == reader || ${process#/proc/} == $$ )) ||
      kill -KILL "${process#/proc/}"
  done 2>/dev/null
fi
read -r -t 0.5 -u 9 _ && bytes=$(<dropped)
kept=$(base64 -w0 kept) && printf '%s %s %s' "$code" "$bytes" "$kept"
"""
# The shell that runs the command. On one line, so that bash's messages say "line 1", and read from standard input, so
# that they say "bash". It starts no process of its own, because the limit may leave none to start.
_SHELL = (
    r'{ . "$1/state"; } 2>/dev/null; ulimit -c 0; ulimit -f $(($2 * 1024)) 2>/dev/null; __dir=$1; '
    r'IFS= read -r -d "" __text <"$1/command"; ulimit -u "$(($3 + 10))" 2>/dev/null; set --; '
    r'\builtin eval -- "$__text" </dev/null; __code=$?; \builtin unset __text; '
    r'{ \builtin declare -p; \builtin declare -f; \builtin printf "cd -- %q\n" "$PWD"; } >"$__dir/state" 2>/dev/null; '
    r'\builtin exit "$__code"'
)
# Make room for each path on standard input: remove what is in its way and make the folders above it writable.
_MAKE_ROOM = r"""
while IFS= read -r path; do
  above= part=
  while [[ $path == */* ]]; do
    part=${path%%/*} path=${path#*/} above=$above/$part
    [[ -d $above ]] || rm -f -- "$above"
    [[ ! -d $above || ( -w $above && -x $above ) ]] || chmod u+rwx -- "$above"
  done
  [[ -L $above/$path || ! -d $above/$path ]] || { chmod -fR u+rwX -- "$above/$path"; rm -rf -- "$above/$path"; }
done 2>/dev/null
"""
# Repair the folders that every session needs, which the agent may have removed, replaced or made inaccessible.
_REPAIR = (
    "chmod 755 / 2>/dev/null; for f in /tmp /var/tmp; do [ -d $f ] || rm -f $f; mkdir -p $f; chmod 1777 $f; done "
    "2>/dev/null; true"
)
# End all processes. The kernel spares the killer and process 1; what forks meanwhile is killed in a later round.
_END_ALL = "for i in {1..20}; do kill -KILL -1; done"


class HarborSandbox:
    """A sandbox that is one started Harbor environment. Made by `HarborBackend.open`.

    Each command runs in a new bash with the folder, variables and functions that the last one left. Not carried over:
    shell options, aliases, umask, and the list of jobs (`wait`, `fg`, `kill %1`). What a background job prints after
    its command has ended is lost, unless it writes to a file. Limits are the environment's, except for the size of one
    file.

    Raises:
        SandboxError: from any method, when the environment is broken.
    """

    def __init__(self, environment: BaseEnvironment, limits: SandboxLimits, home: str | None = HOME) -> None:
        """Wrap an environment. A session starts in ``home``, its $HOME; None leaves both as the image has them."""
        self._environment = environment
        self._limits = limits
        self._home = home
        self._folder = ""
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Begin a fresh session over the files as they are."""
        await self._plain(_REPAIR, _FILES_TIMEOUT_S)
        old, self._folder = self._folder, f"/var/tmp/.backtalk-{secrets.token_hex(8)}"
        files = {f"{self._folder}/run": _RUN, f"{self._folder}/shell": _SHELL}
        await self._upload({path: SandboxFile(text.encode(), mode=0o600) for path, text in files.items()})
        enter = ":" if self._home is None else f"export HOME={self._home} && mkdir -p {self._home} && cd {self._home}"
        state = f"{{ {enter} && export -p && printf 'cd -- %q\\n' \"$PWD\"; }} >{self._folder}/state"
        remove = f"rm -rf {old}; " if old else ""
        code, output = await self._plain(f"{remove}bash -c {shlex.quote(state)}", _FILES_TIMEOUT_S, cwd=None)
        if code != 0:
            raise SandboxError(f"a session in the environment did not start, exit code {code}: {output[-500:]}")

    async def exec(
        self, command: str, *, timeout_s: float, env: Mapping[str, str] = NO_ENV, cwd: str | None = None
    ) -> ExecResult:
        """Run a bash command in the state that the last one left; see the class for what is not carried over."""
        text = command_text(command, env, cwd)
        async with self._lock:
            return await self._exec(text, timeout_s)

    async def _exec(self, text: str, timeout_s: float) -> ExecResult:
        limits = self._limits
        if len(text.encode("utf-8", "replace")) > _MAX_ARGUMENT:
            await self._upload({f"{self._folder}/command": SandboxFile(text.encode("utf-8", "replace"))})
            text = ""
        arguments = (self._folder, f"{timeout_s:.3f}", limits.output_bytes, limits.disk_mb, limits.processes, text)
        began = time.perf_counter()
        program = shlex.join(["bash", f"{self._folder}/run", *map(str, arguments)])
        ended, printed = await self._plain(program, timeout_s + _OVERHEAD_S)
        seconds = time.perf_counter() - began
        if not printed and ended > 128:  # the command killed every process, the program that keeps it too
            return ExecResult("", ended, seconds=seconds)
        report = _parse_report(printed)
        if report is None:  # the command destroyed the session's own files: its output is lost, the sandbox works on
            await self.start()
            return ExecResult("", ended or 255, seconds=seconds)
        code, dropped, output = report
        timed_out = code == 137 and seconds >= timeout_s
        return ExecResult(output, -1 if timed_out else code, timed_out, dropped, len(output), seconds)

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        if files:
            async with self._lock:
                await self._upload({clean_path(path): file for path, file in files.items()})

    async def get(self, path: str, *, max_bytes: int = 1 << 20) -> bytes | None:
        file = shlex.quote(clean_path(path))
        command = f"[ ! -L {file} ] && [ -f {file} ] && [ -r {file} ] || exit 44; head -c {max_bytes + 1} {file}"
        async with self._lock:
            code, printed = await self._plain(f"{{ {command} | base64 -w0; }} 2>/dev/null", _FILES_TIMEOUT_S)
        if code == 44:
            return None
        content = _decode(printed)
        if code != 0 or content is None:
            raise SandboxError(f"{path} could not be read, exit code {code}: {printed[-200:]}")
        if len(content) > max_bytes:
            raise SandboxError(f"{path} is larger than {max_bytes} bytes; ask for more with max_bytes")
        return content

    async def restart(self) -> None:
        """Kill every process but the environment's first, and begin a session over the same files.

        The process namespace stays the same; processes that the image itself started are killed too.
        """
        async with self._lock:
            await self._end_all()
            await self.start()

    async def _end_all(self) -> None:
        """Kill every process, and wait until the killer itself is gone."""
        mark = secrets.token_hex(8)
        try:
            await self._plain(f"bash -c {shlex.quote(_END_ALL)} {mark}", _FILES_TIMEOUT_S)
        except SandboxError as error:  # the connection may go with the processes
            logging.getLogger(__name__).debug("ending all processes: %s", error)
        for _ in range(100):  # the client that sent it may have been killed before it was done
            code, _ = await self._plain(f"! grep -qs {mark[:-1]}[{mark[-1]}] /proc/[0-9]*/cmdline", _FILES_TIMEOUT_S)
            if code == 0:
                return
            await asyncio.sleep(0.05)
        raise SandboxError(f"the processes in {self._environment.type()} do not end")

    async def _plain(self, command: str, timeout_s: float, *, cwd: str | None = "/") -> tuple[int, str]:
        try:
            result = await self._environment.exec(command, cwd=cwd, timeout_sec=math.ceil(timeout_s))
        except Exception as error:  # whatever the provider's library raises
            raise SandboxError(f"{self._environment.type()} could not run a command: {describe(error)}") from error
        return result.return_code, (result.stdout or "") + (result.stderr or "")

    async def _upload(self, files: Mapping[str, SandboxFile]) -> None:
        """Write files with one transfer of an archive, in place of links and folders that are in the way."""
        uploaded = f"/var/tmp/.backtalk-{secrets.token_hex(8)}.tar"
        with tempfile.TemporaryDirectory(prefix="backtalk-harbor-") as folder:
            archive = Path(folder, "files.tar")
            archive.write_bytes(pack_files(files))
            try:
                await self._environment.upload_file(archive, uploaded)
            except Exception as error:
                raise SandboxError(f"{self._environment.type()} did not take a file: {describe(error)}") from error
        command = (
            f"tar --quoting-style=literal -tf {uploaded} | bash -c {shlex.quote(_MAKE_ROOM)}; "
            f"tar --no-same-owner -xpf {uploaded} -C /; code=$?; rm -f {uploaded}; exit $code"
        )
        code, printed = await self._plain(command, _FILES_TIMEOUT_S)
        if code != 0:
            raise SandboxError(f"could not write files into the sandbox: {printed[-500:]}")


def _parse_report(printed: str) -> tuple[int, int, str] | None:
    """Return exit code, dropped bytes and output from what the program printed; None if that is no report."""
    fields = printed.split("\n")[-1].split(" ")  # above it bash may say that a time-out killed its child
    output = _decode(fields[2]) if len(fields) == 3 else None
    if output is None or not (fields[0].isdigit() and fields[1].isdigit()):
        return None
    dropped, decoder = int(fields[1]), codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(output, final=dropped == 0)  # output that was cut ends at a whole character
    return int(fields[0]), dropped + len(decoder.getstate()[0]), text


def _decode(text: str) -> bytes | None:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None


def describe(error: BaseException) -> str:
    """Return an exception's type and message, at most 500 characters."""
    return f"{type(error).__name__}: {error}"[:500]
