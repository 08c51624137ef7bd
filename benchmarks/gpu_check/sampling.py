"""Speed of sampling: tokens a second by the number of rollouts, and in rollouts of turns that wait for commands."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backtalk.engines.torch.continuous import ContinuousTorchSampler
from backtalk.engines.torch.draws import sample_tokens
from backtalk.engines.torch.sampler import TorchSampler
from backtalk.rollout.sampler import SamplingParams
from gpu_check.machine import Device
from gpu_check.results import Part, Row
from gpu_check.shapes import SMALL, TINY, Shape
from objective import ratio_interval

PROMPT_TOKENS = 512
AnySampler = TorchSampler | ContinuousTorchSampler


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
    commands_s, rounds = ((0.1, 1.0, 10.0), 3) if device.is_gpu else ((0.01, 0.1, 0.3), 2)
    for count in counts[-2:]:
        part.measure(
            f"{shape.name}, {count} rollouts of 4 turns, commands of {', '.join(f'{s:g}' for s in commands_s)} s",
            lambda count=count: policy.turns(count, 4, tokens // 2, commands_s, rounds),
            expected_s=2 * rounds * (45 if device.is_gpu else 5),
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

    def turns(self, count: int, turns: int, tokens: int, commands_s: Sequence[float], rounds: int) -> Row:
        """Compare waves with continuous batching over the same rollouts, whose commands take one of these times each.

        The modes take turns; the ratio is of wave's seconds to continuous batching's, summed over the rounds, with a
        bootstrap interval. ``slowest rollout's commands s`` is a bound that no sampler beats.
        """
        waits = [random.Random(i).choices(commands_s, k=turns) for i in range(count)]
        played: dict[str, list[_Played]] = {"wave": [], "continuous": []}

        def play(mode: str, kind: type[AnySampler]) -> float:
            played[mode].append(self._play(kind, waits, tokens))
            return played[mode][-1].seconds

        self._play(ContinuousTorchSampler, [[0.0]] * count, 2)  # warms up
        pairs = []
        for number in range(rounds):
            both = {"wave": TorchSampler, "continuous": ContinuousTorchSampler}
            order = sorted(both, reverse=number % 2 == 0)
            seconds = {mode: play(mode, both[mode]) for mode in order}
            pairs.append((seconds["wave"], seconds["continuous"]))
        row: Row = {}
        for mode, runs in played.items():
            seconds = sum(run.seconds for run in runs)
            row |= {
                f"{mode}: tokens/s": rounds * count * turns * tokens / seconds,
                f"{mode}: rollouts/s": rounds * count / seconds,
                f"{mode}: processor s": statistics.mean(run.processor_s for run in runs),
                f"{mode}: wait at the sampler s": statistics.mean(run.wait_s for run in runs),
                f"{mode}: rows of a decode step": statistics.mean(run.rows for run in runs),
            }
        return row | {
            "wave over continuous, in seconds": list(ratio_interval(pairs)),
            "slowest rollout's commands s": max(map(sum, waits)),
            "mean commands of a rollout s": sum(map(sum, waits)) / count,
        }

    def _play(self, kind: type[AnySampler], waits: Sequence[Sequence[float]], tokens: int) -> _Played:
        """Run one rollout for each list of its commands' seconds, all at once."""
        sampler = kind(self.model, params=SamplingParams(max_tokens=tokens), stop_token_ids=(), pad_token_id=0)
        sampling_s = 0.0

        async def rollout(index: int) -> None:
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

        async def rollouts() -> None:
            await asyncio.gather(*(rollout(i) for i in range(len(waits))))

        processor_s = time.process_time()
        seconds = self.device.seconds(lambda: asyncio.run(rollouts()))
        return _Played(
            seconds=seconds,
            processor_s=time.process_time() - processor_s,
            wait_s=sampling_s / len(waits),
            rows=sampler.stats.decode_rows / max(sampler.stats.decode_steps, 1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Played:
    """What one set of rollouts took."""

    seconds: float
    processor_s: float
    wait_s: float  # of a rollout, from asking to its answer, over all turns
    rows: float  # of a decode step
