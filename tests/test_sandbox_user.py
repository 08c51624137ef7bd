"""The same sandbox for an ordinary user: no root, no control groups."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
PROGRAM = r"""
import asyncio, os
from backtalk.sandboxes import SandboxFile, SandboxLimits, local_sandbox

async def main():
    assert os.getuid() != 0
    backend = local_sandbox()
    async with backend.open(SandboxLimits(disk_mb=8)) as box, backend.open(SandboxLimits()) as other:
        async def out(command):
            return (await box.exec(command, timeout_s=20)).output
        assert await out("id -un; cd /srv; export A=1; sleep 9001 & echo $A >f") == "agent\n"
        assert await out("pwd; cat f; pgrep -c sleep") == "/srv\n1\n1\n"
        assert (await other.exec("pgrep -c sleep; ls /srv", timeout_s=20)).output == "0\n"
        assert (await box.exec("sleep 9002", timeout_s=0.3)).timed_out
        await box.put({"/app/x/run.sh": SandboxFile(b"echo ran", mode=0o755)})
        assert await out("bash /app/x/run.sh; echo more >>/app/x/run.sh") == "ran\n"
        assert await box.get("/app/x/run.sh") == b"echo ranmore\n"
        await box.restart()
        assert await out("pwd; cat /srv/f; pgrep -c sleep") == "/home/agent\n1\n0\n"
        assert "No space" in await out("for i in 1 2 3; do head -c 4M /dev/zero >/tmp/big$i; done; rm /tmp/big*")
        assert "unreachable" in await out("exec 9<>/dev/tcp/1.1.1.1/53")
        assert await out("[[ -w /proc/sys/kernel/core_pattern ]] || find /proc/sys -writable 2>/dev/null") == ""
        assert (await box.exec("ulimit -u", timeout_s=20)).output == "66\n"
    assert not [p for p in os.listdir("/proc") if p.isdigit() and is_child(p)]
    print("all good,", backend.report.isolation["user"])

def is_child(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[1]) == os.getpid()
    except OSError:
        return False

asyncio.run(main())
"""


def _user_command() -> list[str]:
    """What runs Python 3.11 or newer as an ordinary user who can read the package, or a skipped test."""
    if os.getuid() != 0:
        return [sys.executable]
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed, so root cannot become an ordinary user")
    check = f"import sys, os; assert sys.version_info >= (3, 11); os.stat({str(SOURCE / 'backtalk' / 'errors.py')!r})"
    for python in (sys.executable, "/usr/bin/python3"):
        command = [setpriv, "--reuid", "1000", "--regid", "1000", "--clear-groups", python]
        tried = subprocess.run([*command, "-c", check], capture_output=True, check=False, cwd="/")
        if tried.returncode == 0:
            return command
    pytest.skip("no Python 3.11 and package that uid 1000 can read (they lie in a folder only root can enter)")


def test_an_ordinary_user_has_the_same_sandbox() -> None:
    command = _user_command()
    ready = [*command[:-1], "unshare", "-Ur", "true"]
    if subprocess.run(ready, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine forbids user namespaces to ordinary users")
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False, env=env, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "all good" in done.stdout and "uid 0 outside" not in done.stdout
    assert done.stderr == ""
