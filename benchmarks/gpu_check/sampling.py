"""Speed of sampling: tokens a second by the number of rollouts, and in rollouts of turns that wait for commands."""

from __future__ import annotations

import asyncio
import math
import random
import time

import torch

from backtalk.engines.torch.sampler import TorchSampler, sample_tokens
from backtalk.rollout.sampler import SamplingParams
from gpu_check.machine import Device
from gpu_check.results import Part, Row
from gpu_check.shapes import SMALL, TINY, Shape

PROMPT_TOKENS = 512


def run(part: Part, device: Device) -> None:
    """Measure one turn at each number of rollouts, then several turns."""
    shape, counts, tokens = (SMALL, (1, 4, 16, 64, 256), 128) if device.is_gpu else (TINY, (1, 4, 16), 32)
    policy = Policy(device, shape)
    bandwidth = part.results.parts.get("speed", {}).get("roofline", {}).get("copy, read and written GB/s", math.nan)
    for count in counts:
        part.measure(
            f"{shape.name}, {count} rollouts, {tokens} tokens each",
            lambda count=count: policy.one_turn(count, tokens, bandwidth),
            expected_s=40 if device.is_gpu else 5,
        )
    commands_s = (0.1, 10.0) if device.is_gpu else (0.01, 0.3)
    for count in counts[-2:]:
        part.measure(
            f"{shape.name}, {count} rollouts of 4 turns, commands of {commands_s[0]:g} to {commands_s[1]:g} s",
            lambda count=count: policy.turns(count, 4, tokens // 2, commands_s),
            expected_s=90 if device.is_gpu else 8,
        )


class Policy:
    """A sampler on random weights that no token stops."""

    def __init__(self, device: Device, shape: Shape) -> None:
        self.device, self.shape = device, shape
        self.model = shape.random_model(device.device, device.dtype)

    def sampler(self, max_tokens: int) -> TorchSampler:
        params = SamplingParams(max_tokens=max_tokens)
        return TorchSampler(self.model, params=params, stop_token_ids=(), pad_token_id=0)

    def prompt(self, noise: random.Random) -> list[int]:
        return [noise.randrange(3, self.shape.vocab) for _ in range(PROMPT_TOKENS)]

    def one_turn(self, count: int, tokens: int, bandwidth_gbs: float) -> Row:
        """Return tokens a second of ``count`` rollouts that begin and end together, and what reading the weights takes.

        The least of two runs, after one that warms up: a run is long, and what disturbs it makes it longer.
        """

        async def rollout(index: int, sampler: TorchSampler) -> None:
            async with sampler.session(f"{index}") as session:
                await session.sample(self.prompt(random.Random(index)))

        async def rollouts(sampler: TorchSampler) -> None:
            await asyncio.gather(*(rollout(i, sampler) for i in range(count)))

        self.device.seconds(lambda: asyncio.run(rollouts(self.sampler(8))))
        self.device.reset_peak()
        seconds = min(self.device.seconds(lambda: asyncio.run(rollouts(self.sampler(tokens)))) for _ in range(2))
        prefill_s = min(self.device.seconds(lambda: asyncio.run(rollouts(self.sampler(1)))) for _ in range(2))
        step_s = (seconds - prefill_s) / (tokens - 1)
        noise = torch.Generator(self.device.device).manual_seed(0)
        logits = torch.randn(count, self.shape.vocab, device=self.device.device, generator=noise).to(self.device.dtype)
        uniforms = torch.rand(count, device=self.device.device, dtype=torch.float64, generator=noise)
        draw_s = self.device.median_seconds(lambda: sample_tokens(logits, uniforms, 1.0))
        weights_s = self.shape.decode_bytes * self.device.dtype.itemsize / 2 / (1e9 * bandwidth_gbs)
        return {
            "tokens/s": count * tokens / seconds,
            "decode step ms": 1e3 * step_s,
            "of that the draw ms": 1e3 * draw_s,
            "reading weights ms": 1e3 * weights_s,
            "prefill ms": 1e3 * prefill_s,
            "memory GiB": self.device.peak_gib(),
        }

    def turns(self, count: int, turns: int, tokens: int, commands_s: tuple[float, float]) -> Row:
        """Return tokens a second of rollouts whose commands take seconds, drawn evenly in their logarithm.

        ``slowest rollout's commands s`` is a bound that no sampler beats.
        """
        low, high = map(math.log, commands_s)
        waits = [[math.exp(random.Random(f"{i}/{t}").uniform(low, high)) for t in range(turns)] for i in range(count)]
        sampling_s = 0.0

        async def rollout(index: int, sampler: TorchSampler) -> None:
            nonlocal sampling_s
            noise = random.Random(index)
            history = self.prompt(noise)
            async with sampler.session(f"{index}") as session:
                for wait_s in waits[index]:
                    started = time.perf_counter()
                    history += (await session.sample(history)).token_ids
                    sampling_s += time.perf_counter() - started
                    await asyncio.sleep(wait_s)
                    history += [noise.randrange(3, self.shape.vocab) for _ in range(100)]

        async def rollouts(sampler: TorchSampler) -> None:
            await asyncio.gather(*(rollout(i, sampler) for i in range(count)))

        sampler = self.sampler(tokens)
        seconds = self.device.seconds(lambda: asyncio.run(rollouts(sampler)))
        return {
            "tokens/s": count * turns * tokens / seconds,
            "in all s": seconds,
            "slowest rollout's commands s": max(map(sum, waits)),
            "mean commands of a rollout s": sum(map(sum, waits)) / count,
            "mean wait at the sampler s": sampling_s / count,
            "waves": sampler.stats.waves,
        }
