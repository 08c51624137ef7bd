"""Tests of what only bubblewrap does, and of how a sandbox looks from outside; the others: test_sandbox_conformance."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes import ExecResult, SandboxFile, SandboxLimits, local_sandbox
from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend, BubblewrapSandbox
from sandbox_help import backend_or_skip, children, groups, open_files, started, with_argument, with_in_environment


@pytest.fixture(scope="module")
def backend() -> BubblewrapBackend:
    return backend_or_skip()


@pytest_asyncio.fixture
async def sandbox(backend: BubblewrapBackend) -> AsyncIterator[BubblewrapSandbox]:
    async with backend.open(SandboxLimits()) as opened:
        yield opened


async def run(sandbox: BubblewrapSandbox, command: str, timeout_s: float = 20.0) -> ExecResult:
    return await sandbox.exec(command, timeout_s=timeout_s)


async def out(sandbox: BubblewrapSandbox, command: str) -> str:
    return (await run(sandbox, command)).output


async def test_the_place_looks_like_a_machine(sandbox: BubblewrapSandbox) -> None:
    assert await out(sandbox, "whoami; hostname; pwd; date +%Z; echo $LANG; cd ~; pwd") == (
        "agent\nbox\n/home/agent\nUTC\nC.UTF-8\n/home/agent\n"
    )
    assert await out(sandbox, "id -u; id -gn; getent passwd agent | cut -d: -f6; getent hosts box | cut -d' ' -f1") == (
        "1000\nagent\n/home/agent\n127.0.0.1\n"
    )
    assert await out(sandbox, "ls -A /root /home/agent /opt /tmp /srv /var/log") == (
        "/home/agent:\n\n/opt:\n\n/root:\n\n/srv:\n\n/tmp:\n\n/var/log:\n"
    )
    assert await out(sandbox, "ls /proc/self/fd | wc -l") == "4\n"  # 0, 1, 2 and the one ls itself opens
    assert await out(sandbox, "nosuchcommand") == "bash: line 1: nosuchcommand: command not found\n"


async def test_nothing_is_mounted_but_what_is_meant(sandbox: BubblewrapSandbox) -> None:
    mounts = set((await out(sandbox, "cut -d' ' -f5 /proc/self/mountinfo")).split())
    allowed = ("/run/reserve", "/usr", "/bin", "/sbin", "/lib", "/proc", "/dev", "/etc/", "/.bwrap")
    assert [mount for mount in mounts - {"/", "/etc"} if not mount.startswith(allowed)] == []
    names = set((await out(sandbox, "env | cut -d= -f1")).split())
    assert names == {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "TZ", "TERM", "PWD", "SHLVL", "_"}
    assert await out(sandbox, "grep ^Seccomp: /proc/self/status") == "Seccomp:\t2\n"


async def test_a_folder_of_this_machine_can_be_shown_and_not_written_to() -> None:
    backend_or_skip()
    with tempfile.TemporaryDirectory() as above:  # which no other uid may enter, as root's home
        shown, hidden = Path(above, "shown"), Path(above, "hidden")
        for folder in (shown, hidden):
            folder.mkdir(mode=0o755)
            (folder / "note").write_text("read me\n")
        backend = BubblewrapBackend(readable=[str(shown)])
        assert str(shown) in backend.report.isolation["files"]
        async with backend.open(SandboxLimits()) as sandbox:
            assert (await sandbox.exec(f"cat {shown}/note", timeout_s=10)).output == "read me\n"
            assert (await sandbox.exec(f"echo x >{shown}/note; echo x >{shown}/new", timeout_s=10)).exit_code != 0
            assert (await sandbox.exec(f"ls {above}", timeout_s=10)).output == "shown\n"
            await sandbox.restart()
            assert (await sandbox.exec(f"cat {shown}/note", timeout_s=10)).output == "read me\n"
        assert (shown / "note").read_text() == "read me\n" and not (shown / "new").exists()


async def test_only_two_processes_are_to_be_seen(sandbox: BubblewrapSandbox) -> None:
    assert await out(sandbox, "all=(/proc/[0-9]*); echo ${#all[@]}") == "2\n"  # supervisor and shell
    assert await out(sandbox, "kill -0 -1") == "bash: line 1: kill: (-1) - No such process\n"


async def test_outside_it_is_an_ordinary_user(backend: BubblewrapBackend, sandbox: BubblewrapSandbox) -> None:
    await out(sandbox, "sleep 8001 &")
    (process,) = started("8001")
    seen = 0
    while process != os.getpid():
        status = Path(f"/proc/{process}/status").read_text()
        ids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
        assert "0" not in ids if os.getuid() == 0 else set(ids) == {str(os.getuid())}
        process = int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])
        seen += 1
    assert seen >= 5  # sleep, supervisor or shell, bubblewrap twice, holder
    if os.getuid() == 0:
        async with backend.open(SandboxLimits()) as other:
            await out(other, "sleep 8012 &")
            owners = {Path(f"/proc/{started(word)[0]}").stat().st_uid for word in ("8001", "8012")}
            assert len(owners) == 2


async def test_root_shut_by_the_agent_is_open_after_a_restart(sandbox: BubblewrapSandbox) -> None:
    result = await run(sandbox, "echo mine >/f; chmod 000 /etc /")
    assert (result.exit_code, result.timed_out) == (0, False)  # its end is told though no path can be opened any more
    assert (await run(sandbox, "true")).exit_code != 0  # the agent's own doing holds until then
    await sandbox.restart()
    assert await out(sandbox, "stat -c %a /; cat /f; whoami; grep -c . /etc/hosts") == "755\nmine\nagent\n2\n"
    await sandbox.put({"/g": SandboxFile(b"g")})
    assert await sandbox.get("/g") == b"g"


async def test_a_restart_gives_memory_beside_the_files_that_are_left() -> None:
    backend = backend_or_skip()
    if "cgroup" not in backend.report.limits["memory"]:
        pytest.skip("this machine lets us make no control groups")
    async with backend.open(SandboxLimits(memory_mb=64, disk_mb=60)) as sandbox:
        await run(sandbox, "head -c 50M /dev/zero >fill")
        held = "head -c 40M /dev/zero | tail -c 40M | wc -c"
        assert (await out(sandbox, held)).split()[-1] == "0"  # 50 + 40 > 64
        await sandbox.restart()
        assert await out(sandbox, held) == f"{40 << 20}\n"


async def test_time_limit_kills_the_tree_and_keeps_the_rest(sandbox: BubblewrapSandbox) -> None:
    await run(sandbox, "cd /srv; export KEPT=yes; echo file >a; sleep 7001 &")
    result = await run(
        sandbox, "echo before; sleep 7002 & (setsid sleep 7003 &); bash -c 'sleep 7004; true'", timeout_s=0.5
    )
    assert (result.output, result.exit_code, result.timed_out) == ("before\n", -1, True)
    assert (
        await out(sandbox, "pwd; echo $KEPT; cat a; pgrep -a sleep | cut -d' ' -f2-") == "/srv\nyes\nfile\nsleep 7001\n"
    )
    assert started("7001") and not with_argument("7003")


async def test_restart_ends_every_process_over_the_same_files(sandbox: BubblewrapSandbox) -> None:
    await run(
        sandbox,
        "cd /srv; export A=1; echo kept >f; (trap '' TERM HUP; setsid sleep 7031 & sleep 7032 &); nohup sleep 7033 &",
    )
    await run(sandbox, "echo 'echo hacked' >~/.bashrc; cp ~/.bashrc ~/.profile; cp ~/.bashrc ~/.bash_profile")
    await sandbox.restart()
    assert not any(map(with_argument, ("7031", "7032", "7033")))
    assert (
        await out(sandbox, "pwd; echo [$A]; cat /srv/f; all=(/proc/[0-9]*); echo ${#all[@]}")
        == "/home/agent\n[]\nkept\n2\n"
    )
    assert await out(sandbox, "echo $$") == "2\n"  # a namespace that had other processes would go on counting


async def test_put_of_too_much_is_an_error_and_breaks_nothing(backend: BubblewrapBackend) -> None:
    async with backend.open(SandboxLimits(disk_mb=4)) as sandbox:
        with pytest.raises(SandboxError, match="do not fit"):
            await sandbox.put({"/srv/big": SandboxFile(bytes(6 << 20))})
        await run(sandbox, "head -c 3M /dev/zero >/srv/half")
        with pytest.raises(SandboxError, match="could not write"):
            await sandbox.put({"/srv/more": SandboxFile(bytes(2 << 20))})
        with pytest.raises(SandboxError, match="Read-only"):
            await sandbox.put({"/usr/lib/new": SandboxFile(b"")})
        assert await out(sandbox, "echo fine") == "fine\n"


async def test_the_trainers_death_ends_everything() -> None:
    program = (
        "import asyncio\nfrom backtalk.sandboxes import *\nasync def main():\n"
        "  async with local_sandbox().open(SandboxLimits()) as sandbox:\n"
        "    await sandbox.exec('sleep 7071 & (setsid sleep 7071 &)', timeout_s=20)\n    print('up', flush=True)\n"
        "    await sandbox.exec('sleep 7071', timeout_s=60)\nasyncio.run(main())\n"
    )
    backend_or_skip()
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert trainer.stdout is not None and await trainer.stdout.readline() == b"up\n"
    assert started("7071")
    trainer.kill()
    await trainer.communicate()
    until_s = time.monotonic() + 20  # a loaded machine takes its time
    while (with_argument("7071") or groups(trainer.pid)) and time.monotonic() < until_s:
        await asyncio.sleep(0.05)
    assert not with_argument("7071") and not groups(trainer.pid)


async def test_a_trainer_killed_during_a_start_leaves_nothing() -> None:
    backend_or_skip()
    program = (
        "import asyncio\nfrom backtalk.sandboxes import SandboxLimits\n"
        "from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend\nasync def one(backend):\n"
        "  async with backend.open(SandboxLimits()): pass\nasync def main():\n"
        "  backend = BubblewrapBackend()\n  print('up', flush=True)\n"
        "  while True: await asyncio.gather(*[one(backend) for _ in range(8)])\nasyncio.run(main())\n"
    )
    mark = f"/nowhere/{secrets.token_hex(8)}"  # bubblewrap is given the trainer's PATH, and nothing else
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{mark}"}
    chance = random.Random(0)
    for _ in range(5):
        trainer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, env=environment
        )
        try:
            assert trainer.stdout is not None and await trainer.stdout.readline() == b"up\n"
            await asyncio.sleep(chance.uniform(0.02, 0.2))
            assert trainer.pid in with_in_environment(mark)
        finally:
            trainer.kill()
            await trainer.communicate()
    until_s = time.monotonic() + 60  # a loaded machine takes its time
    while (left := with_in_environment(mark)) and time.monotonic() < until_s:
        await asyncio.sleep(0.05)
    assert left == []


async def test_nothing_is_left_behind(backend: BubblewrapBackend) -> None:
    files, before = open_files(), children()
    async with backend.open(SandboxLimits()) as sandbox:
        await run(sandbox, "sleep 7041 & (setsid sleep 7042 &)")
        assert started("7041")
    assert not with_argument("7041") and not with_argument("7042")
    assert (open_files(), children(), groups()) == (files, before, [])
    with pytest.raises(SandboxError):
        await run(sandbox, "true")


async def test_nothing_is_left_behind_by_a_cancelled_start_or_use(backend: BubblewrapBackend) -> None:
    files, before = open_files(), children()
    for wait_s in (0.0, 0.005, 0.02, 0.2):
        task = asyncio.create_task(_hold(backend))
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (open_files(), children(), groups()) == (files, before, [])


async def _hold(backend: BubblewrapBackend) -> None:
    async with backend.open(SandboxLimits()) as sandbox:
        await run(sandbox, "sleep 7051", timeout_s=60)


async def test_a_dead_sandbox_says_so_from_every_method(backend: BubblewrapBackend) -> None:
    before = children()
    async with backend.open(SandboxLimits()) as sandbox:
        waiting = asyncio.create_task(run(sandbox, "sleep 7061"))
        await asyncio.sleep(0.2)
        (bubblewrap,) = set(children()) - set(before)
        (holder,) = Path(f"/proc/{bubblewrap}/task/{bubblewrap}/children").read_text().split()
        os.kill(int(holder), signal.SIGKILL)
        with pytest.raises(SandboxError):
            await waiting
        with pytest.raises(SandboxError):
            await run(sandbox, "true")
        with pytest.raises(SandboxError):
            await sandbox.put({"/srv/f": SandboxFile(b"")})
        with pytest.raises(SandboxError):
            await sandbox.get("/srv/f")
        with pytest.raises(SandboxError):
            await sandbox.restart()
    assert (children(), groups()) == (before, [])


async def test_local_sandbox_inside_an_event_loop(backend: BubblewrapBackend) -> None:
    assert local_sandbox().report == local_sandbox("bubblewrap").report == backend.report
    with pytest.raises(ConfigError, match="unsafe"):
        local_sandbox("docker")  # type: ignore[arg-type]
