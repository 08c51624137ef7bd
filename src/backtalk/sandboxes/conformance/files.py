"""Checks of files in and out, and of the fresh session after a restart."""

from __future__ import annotations

import asyncio

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes.base import HOME, SandboxFile
from backtalk.sandboxes.conformance.base import SandboxUnderTest, equal, expect, raises


async def put_and_get(sandbox: SandboxUnderTest) -> None:
    """Check that binary files go in and come out unchanged, and their folders are made."""
    binary = bytes(range(256)) * 400
    await sandbox.inner.put({f"{HOME}/deep/er/data.bin": SandboxFile(binary), f"{HOME}/empty": SandboxFile(b"")})
    equal(await sandbox.get(f"{HOME}/deep/er/data.bin"), binary)
    equal(await sandbox.get(f"{HOME}/empty"), b"")
    await sandbox.exec("echo mine >>deep/er/data.bin")
    equal(await sandbox.get(f"{HOME}/deep/er/data.bin"), binary + b"mine\n")


async def mode_and_date(sandbox: SandboxUnderTest) -> None:
    """Check that a file has the mode and the date it was given, and the agent owns it."""
    await sandbox.put(f"{HOME}/run.sh", b"#!/bin/bash\necho ran\n", mode=0o755, mtime=1_700_000_000)
    await sandbox.prints("./run.sh; stat -c '%a %Y' run.sh; [[ -O run.sh ]] || echo not mine", "ran\n755 1700000000\n")


async def odd_names(sandbox: SandboxUnderTest) -> None:
    """Check that a file name may have spaces, quotes, newlines and letters of any script."""
    name = "a name\nwith 'all' \"kinds\" é"
    await sandbox.put(f"{HOME}/{name}", b"x")
    equal(await sandbox.get(f"{HOME}/{name}"), b"x")
    await sandbox.prints("cat *kinds*", "x")


async def put_wins(sandbox: SandboxUnderTest) -> None:
    """Check that a file replaces a folder or a link at its path, also in folders without rights."""
    await sandbox.exec(
        "mkdir -p x/full/of shut/in; touch x/full/of/things; ln -s /nowhere l; chmod 0 shut/in shut x/full"
    )
    for path in (f"{HOME}/x", f"{HOME}/shut/in/file", f"{HOME}/l"):
        await sandbox.put(path, path.encode())
        equal(await sandbox.get(path), path.encode(), path)


async def relative_paths_are_refused(sandbox: SandboxUnderTest) -> None:
    """Check that a path that is not absolute is refused with an error that says so."""
    with raises(ConfigError, "a relative path was taken", message="absolute"):
        await sandbox.put("notes.txt")


async def get_of_no_file(sandbox: SandboxUnderTest) -> None:
    """Check that pipes, folders, broken and looping links, devices and missing files are read as None, at once."""
    await sandbox.exec("mkfifo pipe; mkdir dir; ln -s /nowhere broken; ln -s loop loop; ln -s /dev/zero zero")
    for name in ("pipe", "dir", "broken", "loop", "zero", "missing"):
        equal(await sandbox.get(f"{HOME}/{name}"), None, name)


async def get_of_a_large_file(sandbox: SandboxUnderTest) -> None:
    """Check that a file larger than asked for is an error, also where it is sparse, and the sandbox goes on."""
    await sandbox.exec("head -c 5000 /dev/zero >big; truncate -s 12M huge")
    equal(await sandbox.get(f"{HOME}/big", max_bytes=5000), bytes(5000))
    for name, max_bytes in (("big", 4999), ("huge", 1 << 20)):
        taken = f"{name} was read though it is larger than {max_bytes} bytes"
        with raises(SandboxError, taken, message="larger than"):
            await sandbox.get(f"{HOME}/{name}", max_bytes=max_bytes)
    await sandbox.still_works()


async def one_tree(sandbox: SandboxUnderTest) -> None:
    """Check that commands see files at the paths under which they were put, as verifiers need it."""
    await sandbox.put("/srv/backtalk-conformance/file", b"here")
    await sandbox.prints("cat /srv/backtalk-conformance/file", "here")


async def restart_keeps_files(sandbox: SandboxUnderTest) -> None:
    """Check that a restart keeps the files, and the session is at home with the variables of a fresh one."""
    before = await sandbox.output("pwd; env | sort")
    await sandbox.exec(
        "mkdir d; echo kept >d/f; cd d; export A=1; b=2; f() { :; }; alias ls=false; ulimit -n 20; umask 077"
    )
    await sandbox.restart()
    await sandbox.prints("pwd; env | sort", before)
    await sandbox.prints(
        "cat d/f; echo [$A$b]; declare -F; umask; (( $(ulimit -n) > 20 )) || echo low", "kept\n[]\n0022\n"
    )


async def restart_ends_processes(sandbox: SandboxUnderTest) -> None:
    """Check that a restart ends every process: with ignored signals, in other sessions, stopped, or orphaned."""
    start = "setsid sleep 1031 & sleep 1032 & nohup sleep 1033 >/dev/null & sh -c 'kill -STOP $$' &"
    await sandbox.exec(f"(trap '' TERM HUP INT; {start}) 2>/dev/null; while :; do echo 1 >>ticks; sleep 0.05; done &")
    await sandbox.restart()
    size = await sandbox.output("sleep 0.2; wc -c <ticks")
    await sandbox.prints("sleep 0.3; wc -c <ticks", size, "a loop goes on writing")
    left = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; done 2>/dev/null | grep -o '^sleep 10.*'"
    await sandbox.prints(left, "", "still there")


async def restart_runs_no_profile(sandbox: SandboxUnderTest) -> None:
    """Check that a fresh session runs nothing that the agent left: profiles, BASH_ENV, programs with usual names."""
    files = "for f in .bashrc .profile .bash_profile .bash_login .bash_logout; do echo 'echo evil' >$f; done"
    programs = "mkdir -p bin; for d in bin .; do printf '#!/bin/bash\\necho evil' >$d/ls; chmod +x $d/ls; done"
    await sandbox.exec(f"{files}; {programs}; export PATH=~/bin:$PATH LD_PRELOAD=/tmp/evil.so BASH_ENV=~/.bashrc")
    await sandbox.restart()
    printed = await sandbox.output("ls /; bash -c 'ls /'; env; declare -F")
    expect("evil" not in printed, f"something of the agent's ran: {printed[:200]!r}")


async def many_at_once(sandbox: SandboxUnderTest) -> None:
    """Check that sixteen sandboxes start, work and end at the same time."""

    async def use(index: int) -> str:
        async with sandbox.another() as other:
            await other.exec(f"echo {index} >me; sleep 0.1")
            return await other.output("cat me")

    equal(await asyncio.gather(*map(use, range(16))), [f"{index}\n" for index in range(16)])
