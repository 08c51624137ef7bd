"""Checks of what one sandbox may use at most, and that reaching a limit costs its own agent alone."""

from __future__ import annotations

import asyncio

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import HOME
from backtalk.sandboxes.conformance.base import LIMITS, SandboxUnderTest, equal, expect, raises, within

_HOLD = "(head -c 40M /dev/zero | tail -c 40M | { sleep 0.5; wc -c; }) 2>/dev/null &"  # tail keeps it all
_FORKS = "bash -c 'for i in {1..60}; do sleep 1101 & done; wait' 2>/dev/null"


async def memory_of_one_process(sandbox: SandboxUnderTest) -> None:
    """Check that one process cannot hold twice the memory limit; a small one beside it lives on."""
    await sandbox.exec("sleep 1111 & echo $! >job")
    size = 2 * LIMITS.memory_mb
    held = await sandbox.output(f"{{ head -c {size}M /dev/zero | tail -c {size}M; }} 2>/dev/null | wc -c")
    equal(held.split()[-1], "0")
    small = await sandbox.output("head -c 20M /dev/zero | tail -c 20M | wc -c; kill -0 $(<job) && echo lives")
    equal(small, f"{20 << 20}\nlives\n")


async def memory_of_all_processes(sandbox: SandboxUnderTest) -> None:
    """Check that all processes of a sandbox together cannot hold more than the memory limit."""
    sizes = (await sandbox.output(f"{{ {_HOLD} {_HOLD} {_HOLD} {_HOLD} wait; }} 2>/dev/null")).split()
    expect(sizes.count(str(40 << 20)) < 4, f"four times 40 MiB were held at once under {LIMITS.memory_mb} MiB")
    await sandbox.still_works()


async def memory_of_files(sandbox: SandboxUnderTest) -> None:
    """Check that files in memory, shared memory and anonymous files too, count as memory or disk."""
    size = 2 * LIMITS.memory_mb
    await sandbox.prints(f"head -c {size}M /dev/zero >/dev/shm/f 2>/dev/null && echo written; rm -f /dev/shm/f", "")
    program = f"""
import os
f = os.memfd_create('f')
try:
    for _ in range({size}): os.write(f, bytes(1 << 20))
    print('written')
except OSError: pass
"""
    expect("written" not in await sandbox.python(program), f"{size} MiB in a file without a name")
    await sandbox.still_works()


async def memory_after_a_restart(sandbox: SandboxUnderTest) -> None:
    """Check that memory held by the agent's files is not missing in the next session, so that the verifier can run."""
    loop = "i=0; while (( i++ < 40000 )); do : >$i$RANDOM$RANDOM$RANDOM || break; done"
    await sandbox.exec(f"(mkdir many; cd many; ulimit -t 8; {loop}) 2>/dev/null", timeout_s=6)
    await sandbox.exec("head -c 12M /dev/zero >fill 2>/dev/null")
    await sandbox.restart()
    await sandbox.prints("head -c 50M /dev/zero | tail -c 50M | wc -c", f"{50 << 20}\n")


async def processes(sandbox: SandboxUnderTest) -> None:
    """Check that processes are limited, and the trainer's own requests still work at the limit."""
    await sandbox.exec(_FORKS, timeout_s=0.5)
    await sandbox.exec(f"{_FORKS} & sleep 0.3", timeout_s=3)
    counted = await sandbox.count_processes()
    expect(10 < counted <= LIMITS.processes + 4, f"{counted} processes under a limit of {LIMITS.processes}")
    await sandbox.put(f"{HOME}/f", b"x")
    equal(await sandbox.get(f"{HOME}/f"), b"x")
    await sandbox.restart()
    expect(await sandbox.count_processes() <= 4, "processes of before the restart are left")


async def processes_are_counted_for_each(sandbox: SandboxUnderTest) -> None:
    """Check that processes of one sandbox do not count for another's limit."""
    async with sandbox.another() as other:
        for counted in (sandbox, other):
            await counted.prints("for i in {1..16}; do sleep 1131 & done; jobs -p | wc -l", "16\n")


async def fork_bomb(sandbox: SandboxUnderTest) -> None:
    """Check that a fork bomb is stopped at the command's time limit, and a restart ends it."""
    with within(30, "the bomb and a restart"):
        await sandbox.exec("bomb() { bomb | bomb & }; bomb; sleep 1121", timeout_s=1)
        await sandbox.restart()
    expect(await sandbox.count_processes() <= 4, "some of it is left")


async def disk(sandbox: SandboxUnderTest) -> None:
    """Check that all files together are limited, wherever they lie, and removing some makes room."""
    fill = "head -c 10M /dev/zero >/srv/a && head -c 10M /dev/zero >/dev/shm/b"
    expect("No space left" in await sandbox.output(fill), "20 MiB were written under a limit of 16")
    await sandbox.exec("head -c 10M /dev/zero >/srv/c")
    more = "head -c 9000 /dev/zero >/var/log/d; head -c 9000 /dev/zero >~/e"
    expect("No space left" in await sandbox.output(more), "there is room on a full disk")
    await sandbox.prints("rm -f /srv/a /srv/c; echo ok >~/g; cat ~/g", "ok\n")


async def sparse_files(sandbox: SandboxUnderTest) -> None:
    """Check that a sparse file cannot be far larger than the disk."""
    await sandbox.fails("truncate -s 1G sparse", "a file of 1 GiB")


async def number_of_files(sandbox: SandboxUnderTest) -> None:
    """Check that the number of files is limited, also of empty ones."""
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
    printed = await sandbox.python(program)
    expect("made 250000" not in printed, f"250,000 files under {LIMITS.memory_mb} MiB of memory")
    await sandbox.restart()
    await sandbox.still_works()


async def open_files(sandbox: SandboxUnderTest) -> None:
    """Check that a process's open files are limited, and files can still be put and read at the limit."""
    program = """
import os
held = []
try:
    while len(held) < 100000: held.append(os.open('/dev/null', os.O_RDONLY))
except OSError: pass
print(len(held))
"""
    expect(int(await sandbox.python(program)) < 100_000, "100,000 files are open in one process")
    await sandbox.put(f"{HOME}/f", b"x")
    equal(await sandbox.get(f"{HOME}/f"), b"x")


async def too_large_to_put(sandbox: SandboxUnderTest) -> None:
    """Check that putting a file that does not fit raises SandboxError, and the sandbox goes on."""
    for size_mib in (LIMITS.disk_mb + 2, LIMITS.disk_mb - 1):
        await sandbox.exec("head -c 3M /dev/zero >half")
        with raises(SandboxError, f"{size_mib} MiB were put on a disk of {LIMITS.disk_mb} MiB with 3 MiB on it"):
            await sandbox.put("/srv/big", bytes(size_mib << 20))
    await sandbox.still_works()


async def full_disk_and_verifier(sandbox: SandboxUnderTest) -> None:
    """Check that the verifier's files and its reward have room on a disk that the agent filled."""
    fill = "cat /dev/zero >/srv/all; cat /dev/zero >/tmp/all; rm -f /run/reserve; echo 1 >/run/reserve"
    await sandbox.exec(fill, timeout_s=9)
    await sandbox.restart()
    await sandbox.put("/tests/test.sh", b"echo ran" + b" " * 500_000)
    await sandbox.prints("bash /tests/test.sh; mkdir -p /logs/v && echo 0 >/logs/v/reward.txt", "ran\n")
    equal(await sandbox.get("/logs/v/reward.txt"), b"0\n")


async def neighbours_of_a_bomb(sandbox: SandboxUnderTest) -> None:
    """Check that another sandbox still answers while one uses all it may."""
    async with sandbox.another() as other:
        command = "bomb() { bomb | bomb & }; bomb; cat /dev/zero | tail"
        bomb = asyncio.ensure_future(sandbox.exec(command, timeout_s=1.5))
        try:
            for _ in range(5):
                result = await other.exec("echo fine; sleep 0.1")
                equal((result.output, result.exit_code), ("fine\n", 0))
        finally:
            await bomb


HARMFUL_IF_OPEN = (
    "memory_of_one_process memory_of_all_processes memory_of_files memory_after_a_restart processes "
    "processes_are_counted_for_each fork_bomb disk number_of_files full_disk_and_verifier neighbours_of_a_bomb"
).split()
