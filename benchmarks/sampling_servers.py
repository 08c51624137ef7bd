"""Measure rollouts whose commands take time: the embedded sampler, in waves, against vLLM, which batches continuously.

    scripts/vllm
    python benchmarks/sampling_servers.py --python .venv-vllm/bin/python

The embedded base model, `--rollouts` at once, `--turns` actions of at most `--tokens` tokens with observations between
them, after commands that take `--delay` seconds on average (exponential, the same for all). Beside both plays
transformers' `generate`: it gets all whole histories in every turn, returns no log-probabilities, and waits for the
slowest command. They play in turn in one run, and the median over the rounds is shown. CPU seconds are those of this
process and of the server together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from backtalk.engines.server.config import ServerConfig
from backtalk.engines.server.process import VllmProcess
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.language.renderer import Renderer
from backtalk.language.tokenizer import model_location
from backtalk.rollout.sampler import ContinuousSampler, SamplingParams


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(50, 400) for _ in range(150)]


def command_s(rng: random.Random, delay_s: float) -> float:
    return rng.expovariate(1 / delay_s) if delay_s else 0


def observation(rng: random.Random) -> list[int]:
    return [rng.randrange(50, 400) for _ in range(rng.randrange(20, 80))]


def play_sampler(engine: TorchEngine, args: argparse.Namespace, delay_s: float) -> int:
    """Play one set of rollouts through an engine's sampler; return the number of action tokens."""
    sampler = engine.sampler(SamplingParams(max_tokens=args.tokens))

    async def rollout(row: int) -> int:
        rng, count = random.Random(row), 0
        history = prompt(rng)
        async with sampler.session(str(row)) as session:
            for _ in range(args.turns):
                action = (await session.sample(history)).token_ids
                await asyncio.sleep(command_s(rng, delay_s))
                history += [*action, *observation(rng)]
                count += len(action)
        return count

    async def rollouts() -> int:
        if isinstance(sampler, ContinuousSampler):
            await sampler.prepare()
        return sum(await asyncio.gather(*(rollout(row) for row in range(args.rollouts))))

    return asyncio.run(rollouts())


@torch.inference_mode()
def play_generate(engine: TorchEngine, args: argparse.Namespace, delay_s: float) -> int:
    """Play the same with `generate`, all rollouts a turn at a time; return the number of action tokens."""
    stop = Renderer(engine.tokenizer, ()).stop_token_ids
    rngs = [random.Random(row) for row in range(args.rollouts)]
    histories, count = [prompt(rng) for rng in rngs], 0
    for _ in range(args.turns):
        width = max(map(len, histories))
        ids = torch.tensor([[0] * (width - len(h)) + h for h in histories])
        mask = torch.tensor([[0] * (width - len(h)) + [1] * len(h) for h in histories])
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": args.tokens}
        out = engine.model.generate(ids, attention_mask=mask, eos_token_id=list(stop), pad_token_id=0, **options)
        for history, row in zip(histories, out[:, width:].tolist(), strict=True):
            action = row[: next((i + 1 for i, token in enumerate(row) if token in stop), len(row))]
            history += action
            count += len(action)
        time.sleep(max(command_s(rng, delay_s) for rng in rngs))
        for history, rng in zip(histories, rngs, strict=True):
            history += observation(rng)
    return count


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
        config = ServerConfig(python=args.python, arguments=("--enforce-eager",))  # compiling takes minutes on a CPU
        server = VllmProcess(config, model_location("base"), "float32", "cpu", Path(folder) / "vllm.log")
        server.wait(900)
        embedded = TorchEngine(TorchConfig(dtype="float32", device="cpu"))
        sampler = ServerConfig(base_url=server.base_url)
        served = TorchEngine(TorchConfig(dtype="float32", device="cpu", sampler=sampler))
        methods: dict[str, Callable[[float], int]] = {
            "generate": lambda delay_s: play_generate(embedded, args, delay_s),
            "embedded, waves": lambda delay_s: play_sampler(embedded, args, delay_s),
            "vLLM": lambda delay_s: play_sampler(served, args, delay_s),
        }
        print(f"{args.rollouts} rollouts, {args.turns} turns of {args.tokens} tokens, {args.threads} threads here")
        print(f"{'':18} {'command':>8} {'tokens/s':>9} {'ratio':>6} {'tokens/cpu s':>13} {'ratio':>6}")
        for delay_s in (0.0, args.delay):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
            for number in range(args.rounds + 1):
                for name, play in methods.items():
                    wall, cpu = time.perf_counter(), cpu_seconds(server.process.pid)
                    tokens = play(delay_s)
                    wall, cpu = time.perf_counter() - wall, cpu_seconds(server.process.pid) - cpu
                    found[name] += [(tokens / wall, tokens / cpu)] * (number > 0)  # the first warms up
            medians = {name: [statistics.median(x) for x in zip(*rows, strict=True)] for name, rows in found.items()}
            base = medians["generate"]
            for name, (wall, cpu) in medians.items():
                ratios = wall / base[0], cpu / base[1]
                print(f"{name:18} {delay_s:6g} s {wall:9.0f} {ratios[0]:6.2f} {cpu:13.0f} {ratios[1]:6.2f}")
        server.end()


if __name__ == "__main__":
    main()
