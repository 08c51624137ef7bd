"""Measure the cost of the local sandbox, beside a bare subprocess and podman. Prints a table in Markdown.

    python benchmarks/sandbox.py
    setpriv --reuid 1000 --regid 1000 --clear-groups python benchmarks/sandbox.py    # root, as an ordinary user

With N at once, all N sandboxes do the same thing at the same time, and so do N bare subprocesses (`bash -c true`), in
alternation. Times are medians in milliseconds of what each of them waited; in brackets the ratio to the bare
subprocess at the same N, which is what stays comparable on a busy or slow machine.

A rollout is one of a terminal task without a policy: a fresh sandbox, files, four commands, a restart,
tests, a reward. The bare rollout is the same commands and tests, each in a `bash -c` of its own in a temporary folder.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.messages import ToolCall
from backtalk.sandboxes import Sandbox, SandboxBackend, SandboxFile, SandboxLimits, local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.task import Task

LIMITS = SandboxLimits()
COMMANDS = ("ls -la", "grep -c ERROR app.log", "sort app.log | uniq -c | head -3", "echo 42 >answer")
TEST = '[ "$(cat answer)" = 42 ]; echo $((1 - $?)) >{reward}'
LOG = "".join(f"{'ERROR' if i % 7 == 0 else 'INFO'} request {i % 13}\n" for i in range(400)).encode()
TASK = Task(
    id="benchmark",
    instruction="write 42",
    files={"/home/agent/app.log": SandboxFile(LOG)},
    tests={"test.sh": SandboxFile(TEST.format(reward="/logs/verifier/reward.txt").encode(), 0o755)},
)
ULIMITS = ("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096")  # podman's own may not be set everywhere
BOMB = "bomb() { while :; do bomb & done; }; bomb & sleep 0.5"


class Table:
    """Rows of milliseconds or other numbers, one column for each N."""

    def __init__(self) -> None:
        self.samples: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        self.cells: dict[tuple[str, int], str] = {}

    async def time_concurrently(self, row: str, n: int, operations: Iterable[Callable[[], Awaitable[object]]]) -> None:
        """Start all at once and record how long each waited."""

        async def timed(operation: Callable[[], Awaitable[object]]) -> None:
            began = time.perf_counter()
            await operation()
            self.samples[row, n].append(1e3 * (time.perf_counter() - began))

        await asyncio.gather(*map(timed, list(operations)))

    def markdown(self, columns: list[int]) -> str:
        shown = [*dict.fromkeys(row for row, _ in self.samples), *dict.fromkeys(row for row, _ in self.cells)]
        for (row, n), samples in self.samples.items():
            median, bare = statistics.median(samples), statistics.median(self.samples[BARE, n])
            ratio = "" if row == BARE else f" ({median / bare:.1f}x)"
            self.cells[row, n] = f"{median:.{0 if median >= 100 else 3}{'f' if median >= 100 else 'g'}}{ratio}"
        lines = [["at once", *map(str, columns)], ["---"] * (len(columns) + 1)]
        lines += [[row, *(self.cells.get((row, n), "") for n in columns)] for row in shown]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BARE = "bare `bash -c true`, ms"


async def bare() -> None:
    """Measure a bare subprocess, to compare with."""
    process = await asyncio.create_subprocess_exec("bash", "-c", "true")
    await process.wait()


async def run_true(sandbox: Sandbox, command: str) -> None:
    result = await sandbox.exec(command, timeout_s=120)
    if result.exit_code != 0:
        raise RuntimeError(f"{command!r} answered {result}")


def memory_mib() -> float:
    """Return the proportional memory of all processes below this one, in MiB."""
    parents, total_kib = {}, 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for process in parents:
        above = parents.get(process, 0)
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        if above:
            with suppress(OSError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                total_kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


async def operations(table: Table, name: str, backend: SandboxBackend, n: int, rounds: int) -> None:
    """Measure each operation in `n` concurrent sandboxes, `rounds` times."""
    file = {"/srv/new/file": SandboxFile(b"x" * 1000)}
    for _ in range(rounds):
        sandboxes: list[Sandbox] = []
        stacks = [AsyncExitStack() for _ in range(n)]

        async def start(stack: AsyncExitStack, sandboxes: list[Sandbox] = sandboxes) -> None:
            sandboxes.append(await stack.enter_async_context(backend.open(LIMITS)))

        await table.time_concurrently(BARE, n, [bare] * n)
        began = time.perf_counter()
        await table.time_concurrently(f"{name}: start", n, [lambda stack=stack: start(stack) for stack in stacks])
        table.cells[f"{name}: starts a second", n] = f"{n / (time.perf_counter() - began):.0f}"
        table.cells[f"{name}: memory of its processes each, MiB", n] = f"{memory_mib() / n:.1f}"
        for _ in range(3 if n > 64 else 6):
            await table.time_concurrently(BARE, n, [bare] * n)
            await table.time_concurrently(
                f"{name}: exec `true`", n, [lambda sandbox=sandbox: run_true(sandbox, "true") for sandbox in sandboxes]
            )
            await table.time_concurrently(
                f"{name}: exec `/bin/true`",
                n,
                [lambda sandbox=sandbox: run_true(sandbox, "/bin/true") for sandbox in sandboxes],
            )
        await table.time_concurrently(
            f"{name}: put", n, [lambda sandbox=sandbox: sandbox.put(file) for sandbox in sandboxes]
        )
        await table.time_concurrently(
            f"{name}: get", n, [lambda sandbox=sandbox: sandbox.get("/srv/new/file") for sandbox in sandboxes]
        )
        await table.time_concurrently(
            f"{name}: restart", n, [lambda sandbox=sandbox: sandbox.restart() for sandbox in sandboxes]
        )
        await table.time_concurrently(f"{name}: stop", n, [lambda stack=stack: stack.aclose() for stack in stacks])


async def rollout(backend: SandboxBackend) -> float:
    async with open_terminal_env(TASK, backend, TerminalConfig(sandbox=LIMITS)) as env:
        await env.reset()
        for command in COMMANDS:
            await env.step(ToolCall("bash", {"command": command}))
        return await env.score() or 0.0


async def bare_rollout() -> float:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app.log").write_bytes(LOG)
        for command in (*COMMANDS, TEST.format(reward="reward.txt")):
            process = await asyncio.create_subprocess_exec(
                "bash", "-c", command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            await process.communicate()
        return float(Path(folder, "reward.txt").read_text())


async def rollouts(table: Table, row: str, n: int, one: Callable[[], Awaitable[float]]) -> None:
    """Run rollouts with a concurrency of `n`."""
    left = max(64, 2 * n)

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            reward = await one()
            if reward != 1.0:
                raise RuntimeError(f"a rollout of {row} ended with reward {reward}")

    count, began = left, time.perf_counter()
    await asyncio.gather(*[worker() for _ in range(n)])
    table.cells[row, n] = f"{count / (time.perf_counter() - began):.1f}"


async def ends(table: Table, name: str, backend: SandboxBackend, count: int) -> None:
    """Measure how long a sandbox takes to end in which processes breed up to the limit."""
    seconds = []
    for _ in range(count):
        stack = AsyncExitStack()
        sandbox = await stack.enter_async_context(backend.open(LIMITS))
        await sandbox.exec(BOMB, timeout_s=5)
        began = time.perf_counter()
        await stack.aclose()
        seconds.append(time.perf_counter() - began)
    p50, p95 = statistics.median(seconds), sorted(seconds)[int(0.95 * (count - 1))]
    table.cells[f"{name}: end with a fork bomb in it, p50 / p95 of {count}, ms", 1] = (
        f"{1e3 * p50:.0f} / {1e3 * p95:.0f}"
    )


class Podman:
    """Podman, as far as it is measured: this machine's /usr over an empty tree, no network, overlay on top."""

    @asynccontextmanager
    async def container(self, root: Path) -> AsyncGenerator[str]:
        limits = ("--memory", f"{LIMITS.memory_mb}m", "--pids-limit", str(LIMITS.processes), *ULIMITS)
        name = await self._podman(
            *("run", "--detach", "--network", "none", *limits, "--volume", "/usr:/usr:ro"),
            *("--rootfs", f"{root}:O", "/usr/bin/sleep", "1000"),
        )
        try:
            yield name
        finally:
            await self._podman("rm", "--force", "--time", "0", name)

    async def measure(self, table: Table, n: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for path in ("proc", "sys", "dev", "etc", "tmp", "run", "usr", "var/tmp"):
                (root / path).mkdir(parents=True)
            for path in ("bin", "sbin", "lib", "lib64"):
                (root / path).symlink_to(f"usr/{path}")
            stacks, names = [AsyncExitStack() for _ in range(n)], []

            async def start(stack: AsyncExitStack) -> None:
                names.append(await stack.enter_async_context(self.container(root)))

            await table.time_concurrently("podman: start", n, [lambda stack=stack: start(stack) for stack in stacks])
            await table.time_concurrently(BARE, n, [bare] * n)
            for _ in range(3):
                await table.time_concurrently(
                    "podman: exec `/bin/true`",
                    n,
                    [lambda name=name: self._podman("exec", name, "true") for name in names],
                )
            await table.time_concurrently("podman: stop", n, [lambda stack=stack: stack.aclose() for stack in stacks])

    async def _podman(self, *arguments: str) -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec("podman", *arguments, stdout=pipe, stderr=pipe)
        said, complaint = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"podman {' '.join(arguments)}: {complaint.decode().strip()}")
        return said.decode().strip()


async def measure(args: argparse.Namespace) -> str:
    table, backend = Table(), local_sandbox()
    name = backend.report.name
    for n in args.concurrency:
        await operations(table, name, backend, n, max(2, args.starts // n))
    for n in args.concurrency:
        await rollouts(table, "bare: rollouts a second", n, bare_rollout)
        await rollouts(table, f"{name}: rollouts a second", n, lambda: rollout(backend))
        pool = PooledBackend(backend)
        await rollouts(table, f"{name} in a pool: rollouts a second", n, lambda pool=pool: rollout(pool))
    await ends(table, name, backend, args.ends)
    if shutil.which("podman"):
        for n in (n for n in args.concurrency if n <= args.podman):
            await Podman().measure(table, n)
    return table.markdown(args.concurrency)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument(
        "--starts", type=int, default=64, help="least number of sandboxes to start, for each concurrency"
    )
    parser.add_argument("--ends", type=int, default=40, help="sandboxes to end with a fork bomb in them")
    parser.add_argument("--podman", type=int, default=16, help="highest concurrency of containers; 0 leaves podman out")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    user = "root" if os.getuid() == 0 else f"uid {os.getuid()}"
    found = asyncio.run(measure(args))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, as {user}, load {load:.1f} before"
    )
    print(f"podman: {'beside it' if shutil.which('podman') and args.podman else 'not measured'}\n\n{found}")


if __name__ == "__main__":
    main()
