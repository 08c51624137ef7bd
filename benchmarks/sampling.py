"""Measure action tokens per second in multi-turn rollouts: TorchSampler, against `generate` over the whole history.

    python benchmarks/sampling.py --rows 32 --threads 1
    python benchmarks/sampling.py --commands 0.1 1 10   # waves beside continuous batching, where commands take seconds

A random model, random observations of uneven length, and a stop token about once in twelve; each method plays
whole sets of rollouts in alternation, and the median over the rounds is shown. CPU seconds are those of the
whole process, so that the numbers mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_check.machine import Device
from gpu_check.sampling import Policy
from gpu_check.shapes import TINY
from transformers import Qwen3Config, Qwen3ForCausalLM

from backtalk.engines.torch.sampler import TorchSampler
from backtalk.rollout.sampler import SamplingParams

STOP_IDS = range(160)  # of 2048: a random model stops with probability 1/13 at each token


def build_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=args.width * 8 // 3,
        tie_word_embeddings=True,
    )
    model: Any = Qwen3ForCausalLM(config)
    return model.to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32).eval()


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(200, 2048) for _ in range(rng.randrange(80, 121))]


def observation(rng: random.Random) -> list[int]:
    return [rng.randrange(200, 2048) for _ in range(rng.randrange(40, 121))]


def play_sampler(model: Any, args: argparse.Namespace, persistent: bool, shared_prompts: bool) -> int:
    """Run one set of rollouts through the sampler; return the number of action tokens."""
    sampler = TorchSampler(
        model,
        params=SamplingParams(max_tokens=args.max_tokens),
        stop_token_ids=STOP_IDS,
        pad_token_id=0,
        persistent_cache=persistent,
    )

    async def rollout(row: int) -> None:
        rng = random.Random(row)
        history = prompt(random.Random(1000 + row // 8) if shared_prompts else rng)
        async with sampler.session(f"{row:03d}") as session:
            for _ in range(args.turns):
                history += (await session.sample(history)).token_ids
                history += observation(rng)

    async def rollouts() -> None:
        await asyncio.gather(*(rollout(row) for row in range(args.rows)))

    asyncio.run(rollouts())
    return sampler.stats.action_tokens


@torch.inference_mode()
def play_generate(model: Any, args: argparse.Namespace) -> int:
    """Run the same with transformers' `generate` on left-padded whole histories; it returns no log-probabilities."""
    rngs = [random.Random(row) for row in range(args.rows)]
    histories = [prompt(rng) for rng in rngs]
    count = 0
    for _ in range(args.turns):
        width = max(map(len, histories))
        ids = torch.tensor([[0] * (width - len(h)) + h for h in histories], device=args.device)
        mask = torch.tensor([[0] * (width - len(h)) + [1] * len(h) for h in histories], device=args.device)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=args.max_tokens,
            eos_token_id=list(STOP_IDS),
            pad_token_id=0,
        )
        for history, row, rng in zip(histories, out[:, width:].tolist(), rngs, strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in STOP_IDS), len(row))
            history += row[:stop] + observation(rng)
            count += stop
    return count


def measure(play: Callable[[], int]) -> tuple[float, float]:
    """Return action tokens per second of wall-clock time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = play()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 32, "turns": 5, "max_tokens": 24, "width": 192, "layers": 5}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--commands", type=float, nargs="+", help="seconds of a command, one of these each")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.commands:
        policy = Policy(Device(torch.device(args.device)), TINY)
        row = policy.turns(args.rows, args.turns, args.max_tokens, args.commands, args.rounds)
        print(f"{TINY.name}, {args.rows} rollouts of {args.turns} turns of {args.max_tokens} tokens, {args.device}")
        for name, value in row.items():
            print(f"{name:40}", " ".join(f"{x:.3g}" for x in (value if isinstance(value, list) else [value])))
        return
    model = build_model(args)
    methods: dict[str, Callable[[], int]] = {
        "generate, history re-read": lambda: play_generate(model, args),
        "TorchSampler, no cache kept": lambda: play_sampler(model, args, False, False),
        "TorchSampler": lambda: play_sampler(model, args, True, False),
        "TorchSampler, groups of 8": lambda: play_sampler(model, args, True, True),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for round_number in range(args.rounds + 1):
        for name, play in methods.items():
            speed = measure(play)
            if round_number > 0:  # the first warms up
                speeds[name].append(speed)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.1f}M parameters, {args.rows} rows, {args.turns} turns, {args.threads} threads, {args.device}")
    print(f"{'action tokens per second':30} {'wall':>8} {'ratio':>6} {'cpu':>8} {'ratio':>6}")
    base_wall, base_cpu = (statistics.median(column) for column in zip(*next(iter(speeds.values())), strict=True))
    for name, values in speeds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:30} {wall:8.0f} {wall / base_wall:6.2f} {cpu:8.0f} {cpu / base_cpu:6.2f}")


if __name__ == "__main__":
    main()
