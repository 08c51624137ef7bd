"""What an agent might try against its own session, so as to deceive the trainer, escape its score, or earn it.

What is believed about a rollout must come from outside of it; and whatever an agent does to its own place, a restart
gives the verifier a place where it works.
"""

from __future__ import annotations

import contextlib
import os
import time

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import HOME
from backtalk.sandboxes.conformance.base import Box, Category, expect, made, same

_KILL = ("kill -9 -1", "kill -9 $$", "kill -9 $PPID", "kill -9 1", "kill -STOP -1", "kill -STOP $$ $PPID")
_SHELL = (
    "IFS=0123456789abcdef", "printf() { :; }; read() { :; }; eval() { :; }; export() { :; }",
    "exec 3<&- 4>&- 5>&- 10<&- 11>&-", "trap 'echo trapped' DEBUG EXIT ERR", "trap '' INT TERM HUP CHLD",
    "shopt -s expand_aliases; alias echo=false while=false", "unset PWD PATH HOME IFS; PATH=/usr/bin:/bin",
    "readonly __id __code __line", "ulimit -n 3; ulimit -u 1", "export BIG=$(head -c 100000 /dev/zero | tr '\\0' x)",
    "mkdir gone; cd gone; rmdir ../gone",
)  # fmt: skip
_FAKE = (
    "for fd in /proc/$$/fd/*; do echo done 1 0 >$fd; done", "printf 'exit 1 1\\0ready 1\\0' >/proc/1/fd/4",
    "printf 'done %s 0\\0/\\0x 9\\0\\0' {a..z} >/proc/$$/fd/4", "cat /proc/1/fd/3 & sleep 0.2",
)  # fmt: skip
_FLOOD = ("cat /dev/zero >/proc/$$/fd/4 & sleep 0.3", "yes >/proc/$$/fd/4 & sleep 0.3")
_REWRITE = "for f in /proc/{1,$$}/fd/*; do chmod 777 $f; echo 'echo evil >&2; exit' >$f; truncate -s 9 $f; done"
_FOLDERS = (
    "mv ~ /gone; mv /tmp /t; mv /run /r; mv /home /h", "rm -rf ~ /tmp /home /var; ln -s /nowhere ~; touch /tmp",
    "chmod 000 ~ /home /tmp /var/tmp /var /etc /run /run/shm /dev/shm /logs /tests", "rm -rf /* /.*",
)  # fmt: skip


async def _recovers(box: Box, *commands: str) -> None:
    """Fail unless after each command, whatever it did, a restart gives a session that works as a verifier needs it."""
    for command in commands:
        began = time.monotonic()
        await box.run(command, timeout_s=1)
        for _ in range(2):  # a forged report may be taken for the answer to the next command, once
            with contextlib.suppress(TimeoutError):
                await box.run("true", timeout_s=0.5)
        try:
            await _verifies(box)
        except SandboxError as error:
            expect(False, f"after `{command}` nothing could be scored: {error}")
        expect(time.monotonic() - began < 40, f"`{command}` held the trainer up for {time.monotonic() - began:.0f} s")


async def _verifies(box: Box) -> None:
    await box.sandbox.restart()
    await box.put(
        "/.conformance/test.sh", b"mkdir -p /logs/v && echo 1 >/logs/v/reward && mktemp >/dev/null && echo $((6 * 7))"
    )
    await box.run("chmod u+rwx /logs")  # as the terminal environment does before it scores
    result = await box.run("pwd; bash /.conformance/test.sh; rm -rf /.conformance")
    same((result.output, result.exit_code), (f"{HOME}\n42\n", 0))
    same(await box.get("/logs/v/reward"), b"1\n")


async def killing_the_exec_server(box: Box) -> None:
    """Killing or stopping everything that is to be seen, the session's own processes too, costs that session alone."""
    await _recovers(box, *_KILL)


async def broken_shell(box: Box) -> None:
    """A shell whose words, limits, files and traps the agent changed costs that session alone."""
    await _recovers(box, *_SHELL)


async def forged_reports(box: Box) -> None:
    """An agent that writes reports of its own to the session's pipes deceives that session alone."""
    await _recovers(box, *_FAKE)


async def flooded_reports(box: Box) -> None:
    """Reports without end fill neither the trainer's memory nor its time."""
    await _recovers(box, *_FLOOD)


async def rewritten_programs(box: Box) -> None:
    """The programs that run the next session cannot be rewritten through files that are open in this one."""
    await _recovers(box, _REWRITE)


async def broken_folders(box: Box) -> None:
    """Folders moved, removed, replaced or shut do not keep a verifier from working."""
    await _recovers(box, *_FOLDERS)


async def shut_root(box: Box) -> None:
    """Not even `chmod 000 /`, after which no program starts, keeps a rollout from its score."""
    await _recovers(box, "chmod 111 /", "chmod 000 /", "(while :; do chmod 000 /; chmod 755 /; done) & sleep 0.2")


async def signal_to_the_trainer(box: Box) -> None:
    """No process of the trainer's is reached by a signal, by any number."""
    numbers = " ".join(map(str, {os.getpid(), os.getppid()}))
    said = await box.out(f"for p in {numbers}; do kill -0 $p && readlink /proc/$p/exe; done 2>/dev/null")
    expect(os.readlink("/proc/self/exe") not in said, "the trainer can be signalled")
    counted = await box.out("kill -0 -1 2>/dev/null && ls /proc | grep -c '^[0-9]'")
    expect(int(counted or "0") <= 4, "more than its own can be signalled")  # its own: at most two shells, ls and grep


async def out_of_sight(box: Box) -> None:
    """Inside there are the session's own processes and no other: what moves files and restarts is out of sight."""
    counted = int((await box.out("all=(/proc/[0-9]*); echo ${#all[@]}")).split()[-1])
    expect(counted <= 4, f"{counted} processes in a fresh session")


async def trusted_files(box: Box) -> None:
    """What programs of the next session trust without asking cannot be replaced: loader, users, names, programs."""
    for attempt in (
        "mv /etc /etc2", "mv /bin /bin2", "rm -rf /lib64/ld*", "mv /usr /usr2", "rm -f /etc/ld.so.preload",
        "echo /tmp/evil.so >/etc/ld.so.preload", "mv x /etc/ld.so.cache", "mv x /etc/passwd", "rmdir /proc",
        "ln -sf /tmp/x /etc/nsswitch.conf",
    ):  # fmt: skip
        expect(await box.code(f"touch x; {attempt}") != 0, f"`{attempt}` succeeded")


async def python_site(box: Box) -> None:
    """Python of a fresh session runs no code of the agent's from the machine's own places for it."""
    version = (await box.python("import sys; print('python%d.%d' % sys.version_info[:2])")).strip()
    places = f"/etc/{version} /usr/lib/{version} /usr/local/lib/{version}/dist-packages /usr/lib/python3/dist-packages"
    plant = "f=$d/sitecustomize.py; rm -f $f; echo 'print(\"evil\")' >$f; echo 'import evil' >$d/evil.pth"
    await box.run(f"for d in {places}; do mkdir -p $d; {plant}; done 2>/dev/null")
    await box.sandbox.restart()
    same(await box.python("print('good')"), "good\n")


async def background_writer(box: Box) -> None:
    """A process that goes on writing a reward is gone before the verifier writes its own."""
    writer = "mkdir -p /logs/verifier; while :; do echo 1 >/logs/verifier/reward.txt; done"
    await box.run(f"setsid bash -c '{writer}' >/dev/null 2>&1 & (trap '' TERM; {writer}) & sleep 0.3")
    await box.sandbox.restart()
    await box.run("rm -rf /logs/verifier; mkdir -p /logs/verifier; echo 0 >/logs/verifier/reward.txt; sleep 0.5")
    same(await box.get("/logs/verifier/reward.txt"), b"0\n")


CHECKS = made(
    Category.ATTACK,
    killing_the_exec_server, broken_shell, forged_reports, flooded_reports, rewritten_programs, broken_folders,
    shut_root, trusted_files, python_site, background_writer, harmful_if_open=True,
) + made(Category.ATTACK, signal_to_the_trainer, out_of_sight)  # fmt: skip
