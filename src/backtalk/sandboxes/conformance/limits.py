"""What one sandbox may use at most, and that running into a limit costs the agent alone."""

from __future__ import annotations

import asyncio
import time

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import HOME
from backtalk.sandboxes.conformance.base import COUNT, LIMITS, Box, Category, Failure, expect, made, same

_HOLD = "(head -c 40M /dev/zero | tail -c 40M | { sleep 0.5; wc -c; }) 2>/dev/null &"  # tail keeps it all
_FORKS = "bash -c 'for i in {1..60}; do sleep 1101 & done; wait' 2>/dev/null"


async def memory_of_one_process(box: Box) -> None:
    """One process cannot hold twice the memory limit; a small one beside it lives on."""
    await box.run("sleep 1111 & echo $! >job")
    size = 2 * LIMITS.memory_mb
    same((await box.out(f"{{ head -c {size}M /dev/zero | tail -c {size}M; }} 2>/dev/null | wc -c")).split()[-1], "0")
    small = await box.out("head -c 20M /dev/zero | tail -c 20M | wc -c; kill -0 $(<job) && echo lives")
    same(small, f"{20 << 20}\nlives\n")


async def memory_of_all_processes(box: Box) -> None:
    """All processes of a sandbox together cannot hold more than the memory limit."""
    sizes = (await box.out(f"{{ {_HOLD} {_HOLD} {_HOLD} {_HOLD} wait; }} 2>/dev/null")).split()
    expect(sizes.count(str(40 << 20)) < 4, f"four times 40 MiB were held at once under {LIMITS.memory_mb} MiB")
    same(await box.out("echo fine"), "fine\n")


async def memory_of_files(box: Box) -> None:
    """A file in memory, shared memory and anonymous files among them, counts as memory or disk."""
    size = 2 * LIMITS.memory_mb
    same(await box.out(f"head -c {size}M /dev/zero >/dev/shm/f 2>/dev/null && echo written; rm -f /dev/shm/f"), "")
    program = f"""
import os
f = os.memfd_create('f')
try:
    for _ in range({size}): os.write(f, bytes(1 << 20))
    print('written')
except OSError: pass
"""
    expect("written" not in await box.python(program), f"{size} MiB in a file without a name")
    same(await box.out("echo fine"), "fine\n")


async def memory_after_a_restart(box: Box) -> None:
    """Memory that the agent's files hold is not missing in the next session: the verifier has room to run."""
    fill = (
        "mkdir many; cd many; ulimit -t 8; i=0; while (( i++ < 40000 )); do : >$i$RANDOM$RANDOM$RANDOM || break; done"
    )
    await box.run(f"({fill}) 2>/dev/null", timeout_s=6)
    await box.run("head -c 12M /dev/zero >fill 2>/dev/null")
    await box.sandbox.restart()
    same(await box.out("head -c 50M /dev/zero | tail -c 50M | wc -c"), f"{50 << 20}\n")


async def processes(box: Box) -> None:
    """A sandbox has no more processes than its limit, and the trainer's own requests still work when it is reached."""
    await box.run(_FORKS, timeout_s=0.5)
    await box.run(f"{_FORKS} & sleep 0.3", timeout_s=3)
    counted = int((await box.out(COUNT)).split()[-1])
    expect(10 < counted <= LIMITS.processes + 4, f"{counted} processes under a limit of {LIMITS.processes}")
    await box.put(f"{HOME}/f", b"x")
    same(await box.get(f"{HOME}/f"), b"x")
    await box.sandbox.restart()
    expect(int(await box.out(COUNT)) <= 4, "processes of before the restart are left")


async def processes_are_counted_for_each(box: Box) -> None:
    """What one sandbox has running takes nothing from another's limit."""
    async with box.another() as other:
        for each in (box, other):
            same(await each.out("for i in {1..16}; do sleep 1131 & done; jobs -p | wc -l"), "16\n")


async def fork_bomb(box: Box) -> None:
    """A fork bomb is stopped at the command's time limit, and a restart ends it."""
    began = time.monotonic()
    await box.run("bomb() { bomb | bomb & }; bomb; sleep 1121", timeout_s=1)
    await box.sandbox.restart()
    expect(time.monotonic() - began < 30, "it took more than 30 s")
    expect(int(await box.out(COUNT)) <= 4, "some of it is left")


async def disk(box: Box) -> None:
    """All files together are no larger than the limit, wherever they lie, and room comes back when they go."""
    fill = "head -c 10M /dev/zero >/srv/a && head -c 10M /dev/zero >/dev/shm/b"
    expect("No space left" in await box.out(fill), "20 MiB were written under a limit of 16")
    await box.run("head -c 10M /dev/zero >/srv/c")
    expect("No space left" in await box.out("head -c 9000 /dev/zero >/var/log/d; head -c 9000 /dev/zero >~/e"), "room")
    same(await box.out("rm -f /srv/a /srv/c; echo ok >~/g; cat ~/g"), "ok\n")


async def sparse_files(box: Box) -> None:
    """A file cannot be stretched far beyond the disk by leaving holes."""
    expect(await box.code("truncate -s 1G sparse") != 0, "a file of 1 GiB")


async def number_of_files(box: Box) -> None:
    """Empty files without end run into a limit too."""
    program = """
import itertools, os, time
os.makedirs('many'); os.chdir('many')
began = time.monotonic()
try:
    for i in itertools.count():
        os.close(os.open('%0200d' % i, os.O_CREAT))
        if i == 250000 or time.monotonic() - began > 10: print('made', i)
        if i == 250000 or time.monotonic() - began > 10: break
except OSError: pass
"""
    said = await box.python(f"{program}")
    expect("made 250000" not in said, f"250,000 files under {LIMITS.memory_mb} MiB of memory")
    await box.sandbox.restart()
    same(await box.out("echo fine"), "fine\n")


async def open_files(box: Box) -> None:
    """A process cannot open files without number, nor keep the sandbox from moving files by it."""
    program = """
import os
held = []
try:
    while len(held) < 100000: held.append(os.open('/dev/null', os.O_RDONLY))
except OSError: pass
print(len(held))
"""
    expect(int(await box.python(program)) < 100_000, "100,000 files are open in one process")
    await box.put(f"{HOME}/f", b"x")
    same(await box.get(f"{HOME}/f"), b"x")


async def too_large_to_put(box: Box) -> None:
    """Files that do not fit are an error of this rollout, and the sandbox goes on."""
    for size_mib in (LIMITS.disk_mb + 2, LIMITS.disk_mb - 1):
        await box.run("head -c 3M /dev/zero >half")
        try:
            await box.put("/srv/big", bytes(size_mib << 20))
        except SandboxError:
            continue
        raise Failure(f"{size_mib} MiB were put on a disk of {LIMITS.disk_mb} MiB with 3 MiB on it")
    same(await box.out("echo fine"), "fine\n")


async def full_disk_and_verifier(box: Box) -> None:
    """A disk that the agent filled does not keep the verifier's files out, nor its reward."""
    await box.run(
        "cat /dev/zero >/srv/all; cat /dev/zero >/tmp/all; rm -f /run/reserve; echo 1 >/run/reserve", timeout_s=9
    )
    await box.sandbox.restart()
    await box.put("/tests/test.sh", b"echo ran" + b" " * 500_000)
    same(await box.out("bash /tests/test.sh; mkdir -p /logs/v && echo 0 >/logs/v/reward.txt"), "ran\n")
    same(await box.get("/logs/v/reward.txt"), b"0\n")


async def neighbours_of_a_bomb(box: Box) -> None:
    """While one sandbox uses all it may, another still answers."""
    async with box.another() as other:
        bomb = asyncio.ensure_future(box.run("bomb() { bomb | bomb & }; bomb; cat /dev/zero | tail", timeout_s=1.5))
        try:
            for _ in range(5):
                result = await other.run("echo fine; sleep 0.1")
                same((result.output, result.exit_code), ("fine\n", 0))
        finally:
            await bomb


CHECKS = made(
    Category.LIMIT,
    memory_of_one_process,
    memory_of_all_processes,
    memory_of_files,
    memory_after_a_restart,
    processes,
    processes_are_counted_for_each,
    fork_bomb,
    disk,
    number_of_files,
    full_disk_and_verifier,
    neighbours_of_a_bomb,
    harmful_if_open=True,
) + made(Category.LIMIT, sparse_files, open_files, too_large_to_put)
