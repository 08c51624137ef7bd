"""What the local sandbox costs, beside a bare subprocess in the same run: start, exec, restart, stop, memory.

    python benchmarks/sandbox.py --sandboxes 1 16 64

With N sandboxes, all N do the same thing at once, and so do N bare subprocesses (`bash -c true`), in alternation.
Times are medians over everything one sandbox waited for; the ratio is to the bare subprocess at the same N, which is
what stays comparable on a busy or slow machine. "cpu" is processor time of the trainer's own process per operation:
what it takes from the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from backtalk.sandboxes import Sandbox, SandboxBackend, SandboxFile, SandboxLimits, local_sandbox

LIMITS = SandboxLimits()


@dataclass
class Measured:
    """Milliseconds one kind of operation took."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    async def together(self, operations: Iterable[Callable[[], Awaitable[object]]]) -> None:
        """Start all at once; note what each waited, and the trainer's processor time per operation."""

        async def timed(operation: Callable[[], Awaitable[object]]) -> None:
            began = time.perf_counter()
            await operation()
            self.wall_ms.append(1e3 * (time.perf_counter() - began))

        began_cpu, operations = time.process_time(), list(operations)
        await asyncio.gather(*map(timed, operations))
        self.cpu_ms.append(1e3 * (time.process_time() - began_cpu) / len(operations))


async def bare() -> None:
    """The yardstick."""
    process = await asyncio.create_subprocess_exec("bash", "-c", "true")
    await process.wait()


async def run_true(box: Sandbox, command: str) -> None:
    result = await box.exec(command, timeout_s=60)
    if result.exit_code != 0:
        raise RuntimeError(f"{command!r} answered {result}")


def memory_mib() -> float:
    """Proportional memory of all bubblewrap and bash processes below this one."""
    parents, total_kib = {}, 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for process in parents:
        above = parents.get(process, 0)
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        if above:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                total_kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


async def measure(backend: SandboxBackend, count: int, rounds: int) -> tuple[dict[str, Measured], float]:
    """Let `count` sandboxes live through every operation, `rounds` times."""
    names = "bare start exec-builtin exec-program put-get restart stop".split()
    found = {name: Measured() for name in names}
    memory = 0.0
    for _ in range(rounds):
        boxes: list[Sandbox] = []
        stacks = [contextlib.AsyncExitStack() for _ in range(count)]

        async def start(stack: contextlib.AsyncExitStack, boxes: list[Sandbox] = boxes) -> None:
            boxes.append(await stack.enter_async_context(backend.open(LIMITS)))

        async def put_get(box: Sandbox) -> None:
            await box.put({"/srv/file": SandboxFile(b"x" * 1000)})
            await box.get("/srv/file")

        await found["bare"].together([bare] * count)
        await found["start"].together([lambda stack=stack: start(stack) for stack in stacks])
        memory = memory_mib() / count
        for _ in range(5):
            await found["bare"].together([bare] * count)
            await found["exec-builtin"].together([lambda box=box: run_true(box, "true") for box in boxes])
            await found["exec-program"].together([lambda box=box: run_true(box, "/bin/true") for box in boxes])
        await found["put-get"].together([lambda box=box: put_get(box) for box in boxes])
        await found["restart"].together([lambda box=box: box.restart() for box in boxes])
        await found["stop"].together([lambda stack=stack: stack.aclose() for stack in stacks])
    return found, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandboxes", type=int, nargs="+", default=[1, 16, 64], help="how many at once")
    parser.add_argument("--operations", type=int, default=64, help="starts to measure at least, for each number")
    args = parser.parse_args()
    backend = local_sandbox()
    print(f"{backend.report.name}: {dict(backend.report.limits)}")
    for count in args.sandboxes:
        found, memory = asyncio.run(measure(backend, count, max(2, args.operations // count)))
        yardstick = statistics.median(found["bare"].wall_ms)
        print(f"\n{count} at once, {memory:.1f} MiB each")
        print(f"{'':14}{'median ms':>10}{'best ms':>9}{'x bare':>8}{'cpu ms':>8}")
        for name, measured in found.items():
            median = statistics.median(measured.wall_ms)
            cpu = statistics.median(measured.cpu_ms)
            print(f"{name:14}{median:10.2f}{min(measured.wall_ms):9.2f}{median / yardstick:8.2f}{cpu:8.2f}")


if __name__ == "__main__":
    main()
