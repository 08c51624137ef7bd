"""What a sandbox keeps from whom: the host from the agent, sandboxes from each other, the past from a fresh session."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backtalk.sandboxes import SandboxLimits
from backtalk.sandboxes.bubblewrap import BubblewrapBackend, BubblewrapSandbox
from sandbox_help import backend_or_skip, started


@pytest.fixture(scope="module")
def backend() -> BubblewrapBackend:
    return backend_or_skip()


@pytest_asyncio.fixture
async def box(backend: BubblewrapBackend) -> AsyncIterator[BubblewrapSandbox]:
    async with backend.open(SandboxLimits()) as sandbox:
        yield sandbox


async def out(box: BubblewrapSandbox, command: str) -> str:
    return (await box.exec(command, timeout_s=20)).output


async def code(box: BubblewrapSandbox, command: str) -> int:
    return (await box.exec(command, timeout_s=20)).exit_code


async def python(box: BubblewrapSandbox, program: str) -> str:
    """What a Python program prints inside, or a skipped test where /usr has no Python."""
    if await code(box, "command -v python3") != 0:
        pytest.skip("the host's /usr has no python3 to try this with")
    return await out(box, f"python3 - <<'E'\n{program}\nE")


# The machine the agent sees


async def test_the_place_looks_like_a_machine(box: BubblewrapSandbox) -> None:
    assert await out(box, "whoami; hostname; pwd; date +%Z; echo $LANG; cd ~; pwd") == (
        "agent\nbox\n/home/agent\nUTC\nC.UTF-8\n/home/agent\n"
    )
    assert await out(box, "id -u; id -gn; getent passwd agent | cut -d: -f6; getent hosts box | cut -d' ' -f1") == (
        "1000\nagent\n/home/agent\n127.0.0.1\n"
    )
    tools = "bash ls cat grep head tail wc sort uniq cut awk find stat diff tar sed tr tee xargs"
    assert await out(box, f"for t in {tools}; do command -v $t >/dev/null || echo no $t; done") == ""


async def test_what_can_be_written(box: BubblewrapSandbox) -> None:
    places = "/home/agent /srv /var/log /app /etc/x /logs /tests /tmp /var/tmp /dev/shm /opt/y /data /run"
    assert await out(box, f"for p in {places}; do mkdir -p $p && echo 1 >$p/f || echo no $p; done") == ""
    assert await out(box, "echo to >/dev/stderr; echo out >/dev/stdout; echo gone >/dev/null") == "to\nout\n"


async def test_what_cannot_be_written(box: BubblewrapSandbox) -> None:
    for path in (
        "/usr/bin/x",
        "/bin/x",
        "/lib/x",
        "/usr/local/bin/x",
        "/dev/x",
        "/proc/x",
        "/etc/passwd",
        "/etc/hosts",
    ):
        assert await code(box, f"echo 1 2>/dev/null >>{path}") != 0, path
    # For the agent's own processes /proc has files one may write to by their mode; the mount forbids it.
    assert await out(box, "find /proc/sys /sys -writable 2>/dev/null") == ""
    assert await out(box, "for f in /proc/sys/kernel/* /proc/sysrq-trigger; do [[ -w $f ]] && echo $f; done") == ""
    assert await code(box, "exec 9>/proc/sys/kernel/core_pattern") != 0
    assert await out(box, "ls -d /sys /dev/mem /dev/kvm /dev/sd* /dev/vd* 2>/dev/null") == ""


async def test_the_host_is_not_there(box: BubblewrapSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await out(box, f"ls -d {tmp_path} {Path.cwd()} 2>/dev/null") == ""
    assert await out(box, "ls -A /root /home/agent /opt /tmp /srv /var/log") == (
        "/home/agent:\n\n/opt:\n\n/root:\n\n/srv:\n\n/tmp:\n\n/var/log:\n"
    )
    mounts = set((await out(box, "cut -d' ' -f5 /proc/self/mountinfo")).split())
    allowed = ("/run/reserve", "/usr", "/bin", "/sbin", "/lib", "/proc", "/dev", "/etc/", "/run/bwrap")
    assert [mount for mount in mounts - {"/", "/etc"} if not mount.startswith(allowed)] == []


async def test_the_environment_is_not_inherited(backend: BubblewrapBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "hunter2")
    async with backend.open(SandboxLimits()) as box:
        assert "hunter2" not in await out(box, "env; cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'")
        names = set((await out(box, "env | cut -d= -f1")).split())
    assert names == {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "TZ", "TERM", "PWD", "SHLVL", "_"}


# Rights


async def test_rights_are_gone(box: BubblewrapSandbox) -> None:
    status = dict(line.split(":\t") for line in (await out(box, "cat /proc/self/status")).splitlines() if ":\t" in line)
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    for attempt in (
        "unshare -U true",
        "unshare -r true",
        "mount -t tmpfs t /tmp",
        "umount /usr",
        "mknod /tmp/d b 8 0",
        "chroot / true",
        "hostname other",
        "chown 0 ~",
        "dmesg",
        "read x </dev/tty",
        "su -c true",
    ):
        assert await code(box, f"{attempt} 2>/dev/null") != 0, attempt


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of the calls are those of x86_64")
async def test_system_calls_that_reach_far_are_refused(box: BubblewrapSandbox) -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = dict(keyctl=250, add_key=248, bpf=321, perf=298, userfaultfd=323, io_uring=425, x32=0x40000027)
for name, number in calls.items():
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print(name, ctypes.get_errno())
print(libc.syscall(39) > 0)
"""
    assert await python(box, program) == "True\n"


async def test_outside_it_is_an_ordinary_user(box: BubblewrapSandbox) -> None:
    await out(box, "sleep 8001 &")
    (process,) = started("8001")
    seen = 0
    while process != os.getpid():
        status = Path(f"/proc/{process}/status").read_text()
        ids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
        assert "0" not in ids if os.getuid() == 0 else set(ids) == {str(os.getuid())}
        process = int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])
        seen += 1
    assert seen >= 5  # sleep, supervisor or shell, bubblewrap twice, holder


async def test_the_holder_is_out_of_sight(box: BubblewrapSandbox) -> None:
    assert await out(box, "all=(/proc/[0-9]*); echo ${#all[@]}") == "2\n"  # supervisor and shell
    assert await out(box, "kill -0 -1") == "bash: line 1: kill: (-1) - No such process\n"


# The network


async def test_there_is_no_network_but_loopback(box: BubblewrapSandbox) -> None:
    assert await out(box, "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '") == "lo\n"
    assert "unreachable" in await out(box, "exec 9<>/dev/tcp/1.1.1.1/53")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "refused" in await out(box, f"exec 9<>/dev/tcp/127.0.0.1/{port}")


async def test_abstract_sockets_of_the_host_are_out_of_reach(box: BubblewrapSandbox) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0backtalk-test")
        server.listen()
        program = "import socket\ntry: socket.socket(socket.AF_UNIX).connect('\\0backtalk-test'); print('reached')\n"
        assert await python(box, program + "except OSError as error: print(error.errno)") == "111\n"


# Sandboxes from each other


async def test_two_sandboxes_share_nothing(backend: BubblewrapBackend) -> None:
    async with backend.open(SandboxLimits()) as one, backend.open(SandboxLimits()) as two:
        await out(one, "echo 1 >/tmp/f; echo 1 >/dev/shm/f; echo 1 >/etc/f; sleep 8011 &")
        assert await out(two, "ls /tmp /dev/shm; cat /etc/f 2>/dev/null; pgrep sleep") == "/dev/shm:\n\n/tmp:\n"
        for name in ("pid", "mnt", "net", "ipc", "uts", "user", "cgroup"):
            read = f"readlink /proc/self/ns/{name}"
            mine, theirs = await asyncio.gather(out(one, read), out(two, read))
            assert mine != theirs and name in mine
            assert mine != os.readlink(f"/proc/self/ns/{name}") + "\n"
        if os.getuid() == 0:
            await out(two, "sleep 8012 &")
            owners = {Path(f"/proc/{started(word)[0]}").stat().st_uid for word in ("8011", "8012")}
            assert len(owners) == 2


# The past from a fresh session


async def test_a_fresh_session_trusts_nothing_the_agent_could_replace(box: BubblewrapSandbox) -> None:
    for attempt in (
        "mv /etc /etc2",
        "mv /bin /bin2",
        "rm -rf /lib64/ld*",
        "mv /usr /usr2",
        "rm -f /etc/ld.so.preload",
        "echo /tmp/evil.so >/etc/ld.so.preload",
        "mv /tmp/x /etc/ld.so.cache",
        "mv /tmp/x /etc/passwd",
        "ln -sf /tmp/x /etc/nsswitch.conf",
        "rmdir /proc",
    ):
        assert await code(box, f"touch /tmp/x; {attempt} 2>/dev/null") != 0, attempt
    evil = "mkdir -p ~/bin; for d in ~/bin ~; do printf '#!/bin/bash\\necho evil' >$d/ls; chmod +x $d/ls; done"
    await out(box, f"{evil}; export PATH=~/bin:$PATH LD_PRELOAD=/tmp/evil.so BASH_ENV=~/evil; cat() {{ echo evil; }}")
    await box.restart()
    assert "evil" not in await out(box, "ls /; bash -c 'ls /'; cat /etc/hostname; env; declare -F")


async def test_python_of_a_fresh_session_has_no_site_of_the_agent(box: BubblewrapSandbox) -> None:
    version = (await python(box, "import sys; print('python%d.%d' % sys.version_info[:2])")).strip()
    site = f"/etc/{version}"
    await out(box, f"mkdir -p {site}; rm -f {site}/sitecustomize.py; echo 'print(\"evil\")' >{site}/sitecustomize.py")
    await box.restart()
    if Path(f"/usr/lib/{version}/sitecustomize.py").is_symlink():  # Debian: it points to /etc
        assert await python(box, "print('good')") == "good\n"
