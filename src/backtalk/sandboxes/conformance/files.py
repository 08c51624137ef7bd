"""Files in and out, and the fresh session after a restart."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes.base import HOME, SandboxFile
from backtalk.sandboxes.conformance.base import Box, Category, Failure, NotApplicable, expect, made, same


async def put_and_get(box: Box) -> None:
    """Binary files go in and come out as they were, into folders that are made for them."""
    binary = bytes(range(256)) * 400
    await box.sandbox.put({f"{HOME}/deep/er/data.bin": SandboxFile(binary), f"{HOME}/empty": SandboxFile(b"")})
    same(await box.get(f"{HOME}/deep/er/data.bin"), binary)
    same(await box.get(f"{HOME}/empty"), b"")
    await box.run("echo mine >>deep/er/data.bin")
    same(await box.get(f"{HOME}/deep/er/data.bin"), binary + b"mine\n")


async def mode_and_date(box: Box) -> None:
    """A file gets the mode and the date it was given, and is the agent's own."""
    await box.put(f"{HOME}/run.sh", b"#!/bin/bash\necho ran\n", mode=0o755, mtime=1_700_000_000)
    same(await box.out("./run.sh; stat -c '%a %Y' run.sh; [[ -O run.sh ]] || echo not mine"), "ran\n755 1700000000\n")


async def odd_names(box: Box) -> None:
    """A file name may hold blanks, quotes, line ends and letters of any script."""
    name = "a name\nwith 'all' \"kinds\" é"
    await box.put(f"{HOME}/{name}", b"x")
    same(await box.get(f"{HOME}/{name}"), b"x")
    same(await box.out("cat *kinds*"), "x")


async def put_wins(box: Box) -> None:
    """A file is written over a folder, a link or a shut folder that is in its way."""
    await box.run("mkdir -p x/full/of shut/in; touch x/full/of/things; ln -s /nowhere l; chmod 0 shut/in shut x/full")
    for path in (f"{HOME}/x", f"{HOME}/shut/in/file", f"{HOME}/l"):
        await box.put(path, path.encode())
        same(await box.get(path), path.encode(), path)


async def relative_paths_are_refused(box: Box) -> None:
    """A path that is not absolute is refused with an error that says so."""
    try:
        await box.put("notes.txt")
    except ConfigError as error:
        expect("absolute" in str(error), f"the error says only {error}")
        return
    raise Failure("a relative path was taken")


async def get_of_no_file(box: Box) -> None:
    """Pipes, folders, broken and looping links, devices and missing files are None, at once."""
    await box.run("mkfifo pipe; mkdir dir; ln -s /nowhere broken; ln -s loop loop; ln -s /dev/zero zero")
    for name in ("pipe", "dir", "broken", "loop", "zero", "missing"):
        same(await box.get(f"{HOME}/{name}"), None, name)


async def get_of_a_large_file(box: Box) -> None:
    """A file larger than asked for is an error, also where it is sparse, and the sandbox goes on."""
    await box.run("head -c 5000 /dev/zero >big; truncate -s 12M huge")
    same(await box.sandbox.get(f"{HOME}/big", max_bytes=5000), bytes(5000))
    for name, max_bytes in (("big", 4999), ("huge", 1 << 20)):
        try:
            await box.sandbox.get(f"{HOME}/{name}", max_bytes=max_bytes)
        except SandboxError as error:
            expect("larger than" in str(error), f"the error says only {error}")
        else:
            raise Failure(f"{name} was read though it is larger than {max_bytes} bytes")
    same(await box.out("echo fine"), "fine\n")


async def one_tree(box: Box) -> None:
    """Commands see files at the very paths under which they were put, so that a verifier can be where it must."""
    await box.put("/srv/backtalk-conformance/file", b"here")
    same(await box.out("cat /srv/backtalk-conformance/file"), "here")


async def restart_keeps_files(box: Box) -> None:
    """After a restart the files are there, and the session is back at home with the variables of a fresh one."""
    before = await box.out("pwd; env | sort")
    await box.run("mkdir d; echo kept >d/f; cd d; export A=1; b=2; f() { :; }; alias ls=false; ulimit -n 20; umask 077")
    await box.sandbox.restart()
    same(await box.out("pwd; env | sort"), before)
    same(
        await box.out("cat d/f; echo [$A$b]; declare -F; umask; (( $(ulimit -n) > 20 )) || echo low"),
        "kept\n[]\n0022\n",
    )


async def restart_ends_processes(box: Box) -> None:
    """A restart ends every process: ignored signals, sessions of their own, stopped ones, orphans."""
    hide = (
        "trap '' TERM HUP INT; setsid sleep 1031 & sleep 1032 & nohup sleep 1033 >/dev/null & sh -c 'kill -STOP $$' &"
    )
    await box.run(f"({hide}) 2>/dev/null; while :; do echo 1 >>ticks; sleep 0.05; done &")
    await box.sandbox.restart()
    size = await box.out("sleep 0.2; wc -c <ticks")
    same(await box.out("sleep 0.3; wc -c <ticks"), size, "a loop goes on writing")
    left = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; done 2>/dev/null | grep -o '^sleep 10.*'"
    same(await box.out(left), "", "still there")


async def restart_runs_no_profile(box: Box) -> None:
    """A fresh session does not run what the agent left for it: profiles, BASH_ENV, programs of its own name."""
    files = "for f in .bashrc .profile .bash_profile .bash_login .bash_logout; do echo 'echo evil' >$f; done"
    programs = "mkdir -p bin; for d in bin .; do printf '#!/bin/bash\\necho evil' >$d/ls; chmod +x $d/ls; done"
    await box.run(f"{files}; {programs}; export PATH=~/bin:$PATH LD_PRELOAD=/tmp/evil.so BASH_ENV=~/.bashrc")
    await box.sandbox.restart()
    said = await box.out("ls /; bash -c 'ls /'; env; declare -F")
    expect("evil" not in said, f"something of the agent's ran: {said[:200]!r}")


async def many_at_once(box: Box) -> None:
    """Sixteen sandboxes start, work and end at the same time."""

    async def one(index: int) -> str:
        async with box.another() as other:
            await other.run(f"echo {index} >me; sleep 0.1")
            return await other.out("cat me")

    same(await asyncio.gather(*map(one, range(16))), [f"{index}\n" for index in range(16)])


async def links_out_of_get(box: Box) -> None:
    """A link the agent made never lets `get` read a file of this machine."""
    with tempfile.TemporaryDirectory(prefix="backtalk-conformance-") as name:
        host = Path(name)
        host.chmod(0o777)
        (host / "secret").write_text("of the machine")
        await box.run(
            f"ln -s {host} link; ln -s {host}/secret direct; ln -s /proc/1/root{host} up; ln -s /proc/1/cwd cwd"
        )
        for path in ("link/secret", "direct", "up/secret", "cwd/etc/shadow"):
            got = await box.get(f"{HOME}/{path}")
            expect(got is None or b"of the machine" not in got, f"{path} was read")


async def links_out_of_put(box: Box) -> None:
    """A link the agent made never lets `put` write outside of the sandbox."""
    with tempfile.TemporaryDirectory(prefix="backtalk-conformance-") as name:
        host = Path(name)
        host.chmod(0o777)
        (host / "secret").write_text("of the machine")
        await box.run(f"ln -s {host} link; ln -s {host}/secret direct")
        for path in ("link/new", "direct"):
            try:
                await box.put(f"{HOME}/{path}", b"written")
            except SandboxError:
                continue  # refused: as good
        same(sorted(path.name for path in host.iterdir()), ["secret"])
        same((host / "secret").read_text(), "of the machine")


async def files_of_the_machine(box: Box) -> None:
    """The trainer's folders, temporary files and home are not there to read or to write."""
    with tempfile.TemporaryDirectory(prefix="backtalk-conformance-") as name:
        Path(name).chmod(0o777)
        (Path(name) / "secret").write_text("of the machine")
        same(await box.out(f"cat {name}/secret 2>/dev/null"), "")
        expect(await box.code(f"echo 1 >{name}/new") != 0, "a file of the machine was written")
    here = Path(__file__).parent
    if here.parts[1:2] == ("usr",):
        raise NotApplicable("the package itself lies in /usr, which sandboxes may share read-only")
    same(await box.out(f"ls -d {here} 2>/dev/null"), "", "the trainer's own code")


CHECKS = (
    made(
        Category.BEHAVIOUR,
        put_and_get,
        mode_and_date,
        odd_names,
        put_wins,
        relative_paths_are_refused,
        get_of_no_file,
        get_of_a_large_file,
        one_tree,
        restart_keeps_files,
        restart_ends_processes,
        restart_runs_no_profile,
        many_at_once,
    )
    + made(Category.ATTACK, links_out_of_get, links_out_of_put)
    + made(Category.ATTACK, files_of_the_machine)
)
