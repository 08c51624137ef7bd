"""Memory, processes and disk are limited, with control groups and without; and the limits do not hit the trainer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from backtalk.sandboxes import SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap import BubblewrapBackend, BubblewrapSandbox
from sandbox_help import backend_or_skip

LIMITS = SandboxLimits(memory_mb=96, processes=24, disk_mb=16)
FAST_FORK = "/bin/bash -c 'for i in {1..60}; do sleep 8101 & done; wait' 2>/dev/null"


@pytest.fixture(scope="module", params=["control groups", "rlimits alone"])
def backend(request: pytest.FixtureRequest) -> BubblewrapBackend:
    backend = backend_or_skip(use_cgroups=request.param == "control groups")
    if request.param == "control groups" and "cgroup" not in backend.report.limits["memory"]:
        pytest.skip("this machine lets us make no control groups")
    return backend


@pytest_asyncio.fixture
async def box(backend: BubblewrapBackend) -> AsyncIterator[BubblewrapSandbox]:
    async with backend.open(LIMITS) as sandbox:
        yield sandbox


async def out(box: BubblewrapSandbox, command: str) -> str:
    return (await box.exec(command, timeout_s=20)).output


async def test_the_report_says_what_is_in_force(backend: BubblewrapBackend) -> None:
    limits = backend.report.limits
    grouped = "cgroup" in limits["memory"]
    assert ("cgroup" in limits["processes"]) == grouped
    assert any("memory cgroup" in warning for warning in backend.report.warnings) != grouped


async def test_memory(box: BubblewrapSandbox) -> None:
    await out(box, "sleep 8111 &")
    result = await box.exec("head -c 200M /dev/zero | tail -c 200M | wc -c", timeout_s=20)  # tail keeps it all
    assert result.output.split()[-1] == "0"
    assert await out(box, "head -c 20M /dev/zero | tail -c 20M | wc -c; pgrep -c sleep") == f"{20 << 20}\n1\n"


async def test_memory_of_all_processes_together(backend: BubblewrapBackend) -> None:
    if "cgroup" not in backend.report.limits["memory"]:
        pytest.skip("rlimits hold for each process on its own; the report warns of it")
    async with backend.open(LIMITS) as box:
        hold = "(head -c 40M /dev/zero | tail -c 40M | { sleep 0.5; wc -c; }) &"
        sizes = (await out(box, f"{hold} {hold} {hold} {hold} wait")).split()
        assert sizes.count(str(40 << 20)) < 4
        assert await out(box, "echo fine") == "fine\n"


async def test_processes(box: BubblewrapSandbox) -> None:
    await box.exec(FAST_FORK, timeout_s=1)
    await box.exec(f"{FAST_FORK} & sleep 0.3", timeout_s=3)
    counted = await box.exec("all=(/proc/[0-9]*); echo ${#all[@]}", timeout_s=5)
    assert 10 < int(counted.output.split()[-1]) <= LIMITS.processes + 2
    # The agent is at its limit; the trainer's own requests are not.
    await box.put({"/srv/f": SandboxFile(b"x")})
    assert await box.get("/srv/f") == b"x"
    await box.restart()
    assert await out(box, "all=(/proc/[0-9]*); echo ${#all[@]}") == "2\n"


async def test_a_fork_bomb_is_stopped_at_the_time_limit(box: BubblewrapSandbox) -> None:
    began = time.monotonic()
    await box.exec("bomb() { bomb | bomb & }; bomb; sleep 8121", timeout_s=1)
    assert time.monotonic() - began < 15
    await box.restart()
    assert await out(box, "echo fine") == "fine\n"


async def test_processes_are_counted_for_each_sandbox(backend: BubblewrapBackend) -> None:
    async with backend.open(LIMITS) as one, backend.open(LIMITS) as two:
        for box in (one, two):
            assert await out(box, "for i in {1..16}; do sleep 8131 & done; jobs -p | wc -l") == "16\n"


async def test_disk(box: BubblewrapSandbox) -> None:
    result = await box.exec("head -c 15M /dev/zero >/srv/a && head -c 10M /dev/zero >/dev/shm/b", timeout_s=20)
    assert "No space left" in result.output
    assert "No space left" in await out(box, "echo more >/tmp/c; echo more >/var/log/d; echo more >/etc/e")
    assert await out(box, "rm /srv/a; echo ok >/tmp/c; cat /tmp/c") == "ok\n"
    assert (await box.exec("head -c 1M /dev/zero >/dev/x || mkdir /dev/y", timeout_s=20)).exit_code != 0


async def test_one_file(box: BubblewrapSandbox) -> None:
    assert (await box.exec("truncate -s 1G /srv/sparse", timeout_s=20)).exit_code != 0
