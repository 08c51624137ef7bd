"""Measure rollouts whose commands take time: the embedded sampler, in waves, against vLLM, which batches continuously.

    scripts/vllm
    python benchmarks/sampling_servers.py --python .venv-vllm/bin/python

The embedded base model, `--rollouts` at once, `--turns` actions of `--tokens` tokens with observations between them,
after commands that take `--delay` seconds on average (exponential, the same for both samplers). The two play in turn in
one run, and the median over the rounds is shown. CPU seconds are those of this process and of the server together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from backtalk.engines.server.config import ServerConfig
from backtalk.engines.server.process import VllmProcess
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.language.tokenizer import model_location
from backtalk.rollout.sampler import ContinuousSampler, SamplingParams


async def play(engine: TorchEngine, args: argparse.Namespace, delay_s: float) -> None:
    """Play one set of rollouts."""
    sampler = engine.sampler(SamplingParams(max_tokens=args.tokens))
    if isinstance(sampler, ContinuousSampler):
        await sampler.prepare()

    async def rollout(row: int) -> None:
        rng = random.Random(row)
        history = [rng.randrange(50, 400) for _ in range(150)]
        async with sampler.session(str(row)) as session:
            for _ in range(args.turns):
                history += (await session.sample(history)).token_ids
                await asyncio.sleep(rng.expovariate(1 / delay_s) if delay_s else 0)
                history += [rng.randrange(50, 400) for _ in range(rng.randrange(20, 80))]

    await asyncio.gather(*(rollout(row) for row in range(args.rollouts)))


def cpu_seconds(server: int) -> float:
    """Return the CPU seconds of this process, and of the server's process group so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == server)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rollouts": 32, "turns": 4, "tokens": 24, "threads": 1, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--delay", type=float, default=0.5)
    parser.add_argument("--python", help="of an environment with vLLM; this one without it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(python=args.python)
        server = VllmProcess(config, model_location("base"), "float32", Path(folder) / "vllm.log")
        server.wait(900)
        engines = {
            "embedded, waves": TorchEngine(TorchConfig(dtype="float32", device="cpu")),
            "vLLM": TorchEngine(
                TorchConfig(dtype="float32", device="cpu", sampler=ServerConfig(base_url=server.base_url))
            ),
        }
        print(f"{args.rollouts} rollouts, {args.turns} turns of {args.tokens} tokens, {args.threads} threads here")
        print(f"{'':18} {'command':>8} {'rollouts/s':>11} {'ratio':>6} {'tokens/s':>9} {'cpu s':>7} {'ratio':>6}")
        for delay_s in (0.0, args.delay):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
            for number in range(args.rounds + 1):
                for name, engine in engines.items():
                    wall, cpu = time.perf_counter(), cpu_seconds(server.process.pid)
                    asyncio.run(play(engine, args, delay_s))
                    spent = time.perf_counter() - wall, cpu_seconds(server.process.pid) - cpu
                    found[name] += [spent] * (number > 0)  # the first warms up
            medians = {name: [statistics.median(x) for x in zip(*rows, strict=True)] for name, rows in found.items()}
            base = medians["embedded, waves"]
            for name, (wall, cpu) in medians.items():
                rate = args.rollouts / wall
                print(
                    f"{name:18} {delay_s:6g} s {rate:11.2f} {base[0] / wall:6.2f} "
                    f"{rate * args.turns * args.tokens:9.0f} {cpu:7.2f} {cpu / base[1]:6.2f}"
                )
        server.end()


if __name__ == "__main__":
    main()
