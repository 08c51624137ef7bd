"""Tests of the pool, over a backend that counts and over the real one, and of how many sandboxes a machine holds."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes import SandboxFile, SandboxLimits
from backtalk.sandboxes import pool as pool_module
from backtalk.sandboxes.machine import capacity as capacity_module
from backtalk.sandboxes.machine.capacity import (
    SHARED_BY,
    Capacity,
    Resources,
    available_mb,
    available_resources,
    capacity,
    cores,
    memory_is_short,
)
from backtalk.sandboxes.pool import PooledBackend
from sandbox_help import CountingBackend, FakeSandbox, backend_or_skip, children, groups, open_files

SMALL, LARGE = SandboxLimits(memory_mb=64), SandboxLimits(memory_mb=128)


async def use(pool: PooledBackend, limits: SandboxLimits = SMALL, seconds: float = 0.002) -> FakeSandbox:
    async with pool.open(limits) as sandbox:
        assert isinstance(sandbox, FakeSandbox) and sandbox.alive and sandbox.limits == limits and sandbox.uses == 0
        sandbox.uses += 1
        await asyncio.sleep(seconds)
        return sandbox


async def test_no_more_start_and_live_than_allowed_and_nobody_is_forgotten() -> None:
    backend = CountingBackend()
    pool = PooledBackend(backend, live=5, starts=3)
    sandboxes = await asyncio.gather(*[use(pool) for _ in range(40)])
    assert len(set(sandboxes)) == 40
    assert (backend.most_starting, backend.most_live, backend.live) == (3, 5, 0)


async def test_whoever_asks_first_is_first() -> None:
    backend, order = CountingBackend(), []

    async def use_once(pool: PooledBackend, number: int) -> None:
        async with pool.open(SMALL):
            order.append(number)

    pool = PooledBackend(backend, live=1)
    await asyncio.gather(*[use_once(pool, number) for number in range(8)])
    assert order == list(range(8))


async def test_it_is_closed_before_its_block_is_left_also_by_an_error() -> None:
    backend = CountingBackend()
    pool = PooledBackend(backend)
    assert not (await use(pool)).alive and backend.live == 0
    with pytest.raises(KeyError):
        async with pool.open(SMALL):
            raise KeyError
    assert backend.live == 0


async def test_a_failed_start_costs_one_rollout() -> None:
    def breaks(number: int) -> None:
        if number == 3:
            raise SandboxError("no room")

    backend = CountingBackend(breaks)
    pool = PooledBackend(backend, live=2)
    found = await asyncio.gather(*[use(pool) for _ in range(6)], return_exceptions=True)
    assert [str(error) for error in found if isinstance(error, BaseException)] == ["no room"]
    assert backend.live == 0


async def test_a_bug_of_the_backend_is_raised() -> None:
    async with asyncio.timeout(20):
        with pytest.raises(ZeroDivisionError):
            await use(PooledBackend(CountingBackend(lambda number: 1 / 0)))


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.002, 0.01])
async def test_who_stops_waiting_takes_no_place(seconds: float) -> None:
    backend = CountingBackend()
    pool = PooledBackend(backend, live=3)
    users = [asyncio.create_task(use(pool, seconds=1)) for _ in range(9)]
    await asyncio.sleep(seconds)
    for user in users:
        user.cancel()
    await asyncio.gather(*users, return_exceptions=True)
    await asyncio.gather(*[use(pool) for _ in range(9)])
    assert backend.live == 0 and len(asyncio.all_tasks()) == 1


async def test_other_limits_get_other_sandboxes_of_the_same_places() -> None:
    backend = CountingBackend()
    pool = PooledBackend(backend, live=4)
    await asyncio.gather(*[use(pool, limits, 0.01) for _ in range(9) for limits in (SMALL, LARGE)])
    assert (backend.live, backend.most_live, len(backend.made)) == (0, 4, 18)


async def test_none_is_started_while_memory_is_short_unless_no_other_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "memory_is_short", lambda limits: True)
    monkeypatch.setattr(pool_module, "_MEMORY_PAUSE_S", 0.001)
    backend = CountingBackend()
    pool = PooledBackend(backend, live=8)
    await asyncio.gather(*[use(pool) for _ in range(5)])
    assert backend.most_live == 1


def test_each_event_loop_has_bounds_of_its_own() -> None:
    backend = CountingBackend()
    pool = PooledBackend(backend, live=2)

    async def use_many() -> None:
        await asyncio.gather(*[use(pool) for _ in range(6)])

    for _ in range(2):
        asyncio.run(use_many())
        assert (backend.live, backend.starting, backend.most_live) == (0, 0, 2)


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_lost_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)

    def sometimes_breaks(number: int) -> None:
        if chance.random() < 0.2:
            raise SandboxError("no room")

    backend = CountingBackend(sometimes_breaks)

    async def use_once(pool: PooledBackend) -> None:
        await asyncio.sleep(chance.uniform(0, 0.05))
        try:
            async with asyncio.timeout(chance.choice([0.001, 0.004, 20, 20])):
                limits = chance.choice([SMALL, LARGE])
                async with pool.open(limits) as sandbox:
                    assert isinstance(sandbox, FakeSandbox) and sandbox.limits == limits and sandbox.uses == 0
                    sandbox.uses += 1
                    await asyncio.sleep(chance.uniform(0, 0.004))
        except (TimeoutError, SandboxError):
            pass

    pool = PooledBackend(backend, live=4, starts=2)
    await asyncio.gather(*[use_once(pool) for _ in range(60)])
    async with asyncio.timeout(20):  # a cancelled rollout does not wait for the end of its sandbox
        while backend.live:
            await asyncio.sleep(0.001)
    assert (backend.live, backend.starting, backend.most_live <= 4, backend.most_starting <= 2) == (0, 0, True, True)
    assert len(asyncio.all_tasks()) == 1


async def test_real_sandboxes_leave_nothing_behind() -> None:
    backend = backend_or_skip()
    files, before = open_files(), children()
    pool = PooledBackend(backend)
    assert pool.report == backend.report

    async def use_once(number: int) -> str:
        async with pool.open(SandboxLimits()) as sandbox:
            await sandbox.put({"/srv/number": SandboxFile(str(number).encode())})
            return (await sandbox.exec("ls -A ~ /tmp; cat /srv/number; echo mine >~/mine", timeout_s=30)).output

    outputs = await asyncio.gather(*[use_once(number) for number in range(12)])
    assert outputs == [f"/home/agent:\n\n/tmp:\n{number}" for number in range(12)]
    assert (open_files(), children(), groups()) == (files, before, [])


def test_numbers_that_give_no_sandbox_are_refused() -> None:
    for wrong in ({"live": 0}, {"starts": 0}):
        with pytest.raises(ConfigError, match="gives no sandbox"):
            PooledBackend(CountingBackend(), **wrong)


def test_the_scarcest_thing_decides() -> None:
    limits = SandboxLimits(memory_mb=512, processes=64)
    plenty = {"cores": 64.0, "memory_mb": 1e9, "processes": 10**9, "open_files": 10**9}

    def holds(**scarce: float) -> int:
        return capacity(limits, Resources(**(plenty | scarce))).sandboxes  # type: ignore[arg-type]

    assert holds(cores=2.0) == 256  # 128 for each
    assert holds(cores=0.5) == 64
    assert holds(memory_mb=16_384) == 210  # 16384 * 7/8 / (4 + 512/8) = 14336 / 68 = 210.8
    assert holds(processes=4_096) == 240  # (4096 - 256) / (8 + 64/8)
    assert holds(open_files=1_024) == 120  # (1024 - 64) / 8
    assert holds(open_files=50) == holds(memory_mb=0.0) == 1
    few = Resources(cores=2.0, memory_mb=1_700.4, processes=9_000, open_files=245)
    assert capacity(limits, few) == Capacity(
        21, "1700 MiB of memory left"
    )  # 1700.4 * 7/8 / 68 = 21.9, before 22 by files


def test_this_machine_has_room() -> None:
    left = available_resources()
    assert 0 < cores() <= (os.cpu_count() or 1) and left.open_files > 0 and left.processes > 0
    total_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 20)
    assert 0 < available_mb() < total_mb
    assert capacity(SandboxLimits()).sandboxes >= 1


@pytest.mark.parametrize(
    ("limit", "used", "value"),
    [
        ("memory.max", "memory.current", "max"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", str((1 << 63) - 4096)),
    ],
)
def test_the_memory_limit_of_every_control_group_above_counts(
    limit: str, used: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 and version 1. 300 MiB may be used above, of which 200 are used and 50 of those are idle files."""
    idle = "inactive_file" if limit == "memory.max" else "total_inactive_file"
    own, above = tmp_path / "above" / "own", tmp_path / "above"
    own.mkdir(parents=True)
    for folder, most in ((own, value), (above, str(300 << 20))):
        (folder / limit).write_text(most + "\n")
        (folder / used).write_text(f"{200 << 20}\n")
        (folder / "memory.stat").write_text(f"cache 1\n{idle} {50 << 20}\n")
    monkeypatch.setattr(capacity_module, "own_groups", lambda controller: (own, above))
    assert available_mb() == 150
    assert memory_is_short(SandboxLimits(memory_mb=147)) and not memory_is_short(SandboxLimits(memory_mb=146))
    assert capacity_module.memory_limits() == [300 << 20]
    assert capacity(SandboxLimits(memory_mb=128)) == Capacity(6, "150 MiB of memory left")  # 150 * 7/8 / (4 + 16)
    monkeypatch.setenv(SHARED_BY, "2")
    assert capacity(SandboxLimits(memory_mb=128)) == Capacity(3, "75 MiB of memory left")


def test_trainings_that_were_started_together_share_all_but_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = available_resources()
    monkeypatch.setenv(SHARED_BY, "4")
    shared = available_resources()
    assert shared.cores == alone.cores / 4 and shared.memory_mb < alone.memory_mb / 2
    assert shared.processes < alone.processes / 2 and shared.open_files == alone.open_files
