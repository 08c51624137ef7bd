"""Measure the cost of a rollout in the Agent World Model: in this process, in a sandbox and over OpenEnv on loopback.

    python benchmarks/awm.py

Medians and the 95th percentile in milliseconds. A reset is a fresh copy of the database; over a server it is a new
connection too. The call is a search of the shop by category.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from urllib.request import urlopen

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.env import AwmEnv
from backtalk.envs.awm.world import AwmWorld, awm_tasks, open_scenarios
from backtalk.messages import ToolCall

ROOT = Path(__file__).parents[1]
ROLLOUTS, CALLS = 40, 25
SEARCH = ToolCall("search_products", {"category": "lamps", "sort_by": "price"})


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return 1000 * (time.perf_counter() - began)


async def measure(world: AwmWorld, source: str) -> dict[str, list[float]]:
    """Return the milliseconds of each reset, call and score."""
    task = awm_tasks(source)[0]
    found: dict[str, list[float]] = {"reset": [], "call": [], "score": []}
    for _ in range(ROLLOUTS + 2):
        env: AwmEnv
        async with world.open(task) as env:
            found["reset"].append(await timed(env.reset))
            for _ in range(CALLS):
                found["call"].append(await timed(lambda env=env: env.step(SEARCH)))
            found["score"].append(await timed(env.score))
    await world.close()
    return {what: times[2 * len(times) // (ROLLOUTS + 2) :] for what, times in found.items()}  # two to warm up


@contextmanager
def served() -> Iterator[str]:
    """Run our server on a free port; yield its URL."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    command = (sys.executable, "-m", "uvicorn", "--factory", "examples.awm_server:make_app", "--app-dir", str(ROOT))
    process = subprocess.Popen([*command, "--port", port, "--log-level", "error"])
    try:
        for _ in range(600):
            time.sleep(0.1)
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}")
    rows = {"in process": asyncio.run(measure(AwmWorld("shop-ten", AwmConfig()), "shop-ten"))}
    with tempfile.TemporaryDirectory() as folder:  # a folder's programs are untrusted
        sys.path.append(str(ROOT / "recipes/shop"))
        from scenario_files import write_scenario

        write_scenario(open_scenarios("shop").scenarios["shop"], Path(folder))
        rows["sandbox"] = asyncio.run(measure(AwmWorld(folder, AwmConfig()), folder))
    with served() as url:
        rows["OpenEnv server"] = asyncio.run(measure(AwmWorld(url, AwmConfig()), f"{url}#shop"))
    base = {what: median(times) for what, times in rows["in process"].items()}
    for where, found in rows.items():
        for what, times in found.items():
            ratio = f"x{median(times) / base[what]:.1f}"
            print(f"{where:15} {what:6} {median(times):7.2f} ms, p95 {quantiles(times, n=20)[-1]:7.2f} ms  {ratio:>6}")


if __name__ == "__main__":
    main()
