"""The backend without isolation: it implements the protocol, warns that it isolates nothing, and cleans up.

No command here may signal more than its own processes: they run on the real machine.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes import SandboxFile, SandboxLimits, local_sandbox
from backtalk.sandboxes.unsafe import UnsafeBackend, UnsafeSandbox
from sandbox_help import children, open_files, started, with_argument


@pytest.fixture(scope="module")
def backend() -> UnsafeBackend:
    try:
        return UnsafeBackend()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest_asyncio.fixture
async def sandbox(backend: UnsafeBackend) -> AsyncIterator[UnsafeSandbox]:
    async with backend.open(SandboxLimits(output_bytes=1000)) as sandbox:
        yield sandbox


async def out(sandbox: UnsafeSandbox, command: str) -> str:
    return (await sandbox.exec(command, timeout_s=20)).output


def test_it_warns(backend: UnsafeBackend) -> None:
    report = local_sandbox("unsafe").report
    assert report.name == "unsafe" and "UNSAFE" in report.warnings[0]
    assert report.isolation["files"] == report.isolation["network"] == "none"


async def test_the_session_goes_on(sandbox: UnsafeSandbox) -> None:
    assert await out(sandbox, "mkdir d; cd d; export A=1; b=2; sleep 6001 & echo ok") == "ok\n"
    assert await out(sandbox, "basename $PWD; echo $A $b; jobs -p | wc -l; nosuch") == (
        "d\n1 2\n1\nbash: line 1: nosuch: command not found\n"
    )
    result = await sandbox.exec("yes", timeout_s=0.5)
    assert result.timed_out and result.output == "y\n" * 500 and result.dropped_bytes > 0
    assert await out(sandbox, "basename $PWD; echo $A [$b]") == "d\n1 []\n"
    assert started("6001")  # older than the command that was stopped
    assert (await sandbox.exec("exit 3", timeout_s=20)).exit_code == 3


async def test_restart_ends_its_processes(sandbox: UnsafeSandbox) -> None:
    await out(sandbox, "echo kept >f; export A=1; sleep 6011 & (setsid sleep 6012 &)")
    await sandbox.restart()
    assert not with_argument("6011") and not with_argument("6012")
    assert await out(sandbox, "cat f; echo [$A]") == "kept\n[]\n"


async def test_files(sandbox: UnsafeSandbox, tmp_path: Path) -> None:
    await sandbox.put({"/home/agent/a/b.sh": SandboxFile(b"echo ran", mode=0o755, mtime=1_700_000_000)})
    assert await out(sandbox, "a/b.sh; stat -c '%a %Y' a/b.sh; echo more >>a/b.sh") == "ran\n755 1700000000\n"
    assert await sandbox.get("/home/agent/a/b.sh") == b"echo ranmore\n"
    (tmp_path / "secret").write_text("host")
    await out(sandbox, f"ln -s {tmp_path} link; ln -s {tmp_path}/secret direct; mkfifo pipe")
    for path in ("link/secret", "direct", "pipe", "a", "missing"):
        assert await sandbox.get(f"/home/agent/{path}") is None, path
    with pytest.raises(SandboxError, match="leads out"):
        await sandbox.put({"/home/agent/link/new": SandboxFile(b"")})
    await sandbox.put({"/home/agent/direct": SandboxFile(b"mine")})
    assert (tmp_path / "secret").read_text() == "host"


async def test_nothing_is_left_behind(backend: UnsafeBackend) -> None:
    files, before = open_files(), children()
    async with backend.open(SandboxLimits()) as sandbox:
        folder = Path((await out(sandbox, "sleep 6021 & pwd")).strip())
        assert folder.is_dir()
    assert not with_argument("6021") and not folder.exists()
    assert (open_files(), children()) == (files, before)
    with pytest.raises(SandboxError):
        await out(sandbox, "true")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run commands under another uid")
async def test_root_runs_commands_under_another_uid(sandbox: UnsafeSandbox) -> None:
    assert int(await out(sandbox, "id -u")) > 10_000
    assert (await sandbox.exec("kill -0 $PPID && kill -0 1", timeout_s=20)).exit_code != 0
