"""Measure the cost of a step in an OpenEnv environment, beside OpenEnv's own client. Prints a table in Markdown.

    python benchmarks/openenv_steps.py
    python benchmarks/openenv_steps.py --rounds 100

Both talk to the same two servers in the same run, in alternation: twenty steps of one, twenty of the other. Theirs is
GenericEnvClient, which gives a dictionary back; ours is a whole OpenEnvEnv.step, so the roles of the observation's
fields and its cut to max_observation_chars are in its time. Times are milliseconds of what the caller waited. A
rollout is connect, reset and close. With 32 at once, a time is that of all 32 steps together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from openenv.core.generic_client import GenericEnvClient

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.env import OpenEnvWorld
from backtalk.messages import ToolCall
from backtalk.tasks.task import Task

SERVERS = Path(__file__).resolve().parent.parent / "tests/openenv_servers"
STEPS = 20  # of one side before the other has its turn
SESSIONS = 64  # half of them ours: places of the server
ECHO, FLOOD = {"message": "hello"}, {"message": "flood 5000000"}
LOOK = {"type": "call_tool", "tool_name": "look", "arguments": {}}


class Table:
    """Milliseconds by row, ours and theirs."""

    def __init__(self) -> None:
        self.samples: defaultdict[str, dict[str, list[float]]] = defaultdict(lambda: {"ours": [], "theirs": []})

    async def time(self, row: str, side: str, repeats: int, operation: Callable[[], Awaitable[Any]]) -> None:
        for _ in range(repeats):
            began = time.perf_counter()
            await operation()
            self.samples[row][side].append(1e3 * (time.perf_counter() - began))

    async def alternate(
        self, row: str, rounds: int, repeats: int, ours: Callable[[], Awaitable[Any]], theirs: Callable
    ) -> None:
        for number in range(rounds + 1):
            first, second = (("ours", ours), ("theirs", theirs))[:: 1 if number % 2 else -1]
            for side, operation in (first, second):
                await self.time(row, side, repeats, operation)
            if number == 0:
                self.samples[row] = {"ours": [], "theirs": []}  # the first round warms both up

    def markdown(self) -> str:
        lines = [
            "| | Backtalk median | p95 | OpenEnv's client median | p95 | ratio of medians | of p95 |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row, sides in self.samples.items():
            ours, theirs = ((statistics.median(x), statistics.quantiles(x, n=20)[-1]) for x in sides.values())
            cells = [f"{x:.2f}" for x in (*ours, *theirs, ours[0] / theirs[0], ours[1] / theirs[1])]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)


async def measure(rounds: int) -> str:
    table, task = Table(), Task(id="benchmark", instruction="")
    worlds = {name: OpenEnvWorld(str(SERVERS / name), OpenEnvConfig()) for name in ("echo", "tools")}
    urls = {name: world.report.name.split(" at ")[1].split()[0] for name, world in worlds.items()}

    async def our_rollout() -> None:
        async with worlds["echo"].open(task) as env:
            await env.reset()

    async def their_rollout() -> None:
        async with GenericEnvClient(urls["echo"]) as client:
            await client.reset()

    try:
        async with AsyncExitStack() as stack:
            ours = {name: await stack.enter_async_context(world.open(task)) for name, world in worlds.items()}
            theirs = {name: await stack.enter_async_context(GenericEnvClient(url)) for name, url in urls.items()}
            for one in (*ours.values(), *theirs.values()):
                await one.reset()
            say, flood, look = ToolCall("act", ECHO), ToolCall("act", FLOOD), ToolCall("look", {})
            echo, client = ours["echo"], theirs["echo"]
            await table.alternate("typed step", rounds, STEPS, lambda: echo.step(say), lambda: client.step(ECHO))
            await table.alternate(
                *("MCP tool call", rounds, STEPS),
                *(lambda: ours["tools"].step(look), lambda: theirs["tools"].step(LOOK)),
            )
            await table.alternate(
                "step of 5 MB", max(1, rounds // 10), 3, lambda: echo.step(flood), lambda: client.step(FLOOD)
            )
            await table.alternate("rollout", rounds, 3, our_rollout, their_rollout)
        async with AsyncExitStack() as stack:
            envs = [await stack.enter_async_context(worlds["echo"].open(task)) for _ in range(SESSIONS // 2)]
            clients = [await stack.enter_async_context(GenericEnvClient(urls["echo"])) for _ in range(SESSIONS // 2)]
            await asyncio.gather(*(one.reset() for one in (*envs, *clients)))
            await table.alternate(
                *(f"typed step, {SESSIONS // 2} at once", max(1, rounds // 5), STEPS),
                lambda: asyncio.gather(*(env.step(say) for env in envs)),
                lambda: asyncio.gather(*(one.step(ECHO) for one in clients)),
            )
    finally:
        for world in worlds.values():
            await world.close()
    return table.markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    table = asyncio.run(measure(parser.parse_args().rounds))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(table)


if __name__ == "__main__":
    main()
