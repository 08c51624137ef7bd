"""Speed and memory of a training step, beside naive logits and other libraries' heads, and the roofline."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from gpu_check.machine import GIB, Device, roofline
from gpu_check.results import Part, Row
from gpu_check.shapes import LARGE, MIDDLE, SMALL, SMOL, TINY, TINY_LORA, Shape
from objective import BASE, METHODS, Problem, alternating, ratio_interval

STEP_TOKENS = 32_768
MEMORY_SHARE = 0.85  # of the device's memory that a predicted step may take before activations are recomputed
GPU_PLAN = [(shape, length) for shape in (SMOL, SMALL, MIDDLE, LARGE) for length in (2048, 8192, 16_384, 32_768)]
CPU_PLAN = [(shape, length) for shape in (TINY, TINY_LORA) for length in (256, 1024)]


def run(part: Part, device: Device) -> None:
    """Measure the ceilings first, then what matters most."""
    ceilings = part.measure("roofline", lambda: roofline(device), expected_s=20)
    peak = next((value for name, value in (ceilings or {}).items() if name.startswith("matrix")), float("nan"))
    plan = GPU_PLAN if device.is_gpu else CPU_PLAN
    step_tokens = STEP_TOKENS if device.is_gpu else 2048
    for shape, length in plan:
        step = Step(device, shape, length, step_tokens, peak)
        part.measure(f"step, {shape.name}, {length} tokens", step.measure, expected_s=30 if device.is_gpu else 8)
    middle = SMALL if device.is_gpu else TINY
    for length in (plan[0][1], plan[1][1], STEP_TOKENS if device.is_gpu else 1024):
        step = Step(device, middle, length, step_tokens, peak)
        part.measure(
            f"step, {middle.name}, {length} tokens, naive logits",
            lambda step=step: step.measure(naive=True),
            expected_s=20 if device.is_gpu else 8,
        )
    world = Step(device, middle, plan[1][1], step_tokens, peak)
    part.measure("world term", world.share_of_world_term, expected_s=40 if device.is_gpu else 10)
    if device.is_gpu:
        for how in ("padded", "packed with flex attention", "compiled"):
            part.measure(
                f"{middle.name}, uneven rollouts, {how}", lambda how=how: uneven(device, middle, how), expected_s=90
            )
    tokens = 16_384 if device.is_gpu else 1024
    for name in METHODS:
        part.measure(
            f"head of {middle.name}, {tokens} tokens: {name}",
            lambda name=name: head(device, middle, tokens, name),
            expected_s=10 if device.is_gpu else 3,
        )


class Step:
    """A training step of one shape: rollouts of one length, ``tokens`` tokens in all."""

    def __init__(self, device: Device, shape: Shape, length: int, tokens: int, peak_tflops: float) -> None:
        self.device, self.shape, self.length, self.peak_tflops = device, shape, length, peak_tflops
        self.tokens = max(tokens, length)
        weight_bytes = device.dtype.itemsize
        self.predicted = shape.step_bytes(weight_bytes, self.tokens, checkpointing=False)
        self.checkpointing = self.predicted > MEMORY_SHARE * device.memory
        if self.checkpointing:
            self.predicted = shape.step_bytes(weight_bytes, self.tokens, checkpointing=True)

    def measure(self, *, naive: bool = False) -> Row:
        """Return tokens a second, MFU, and memory beside its prediction."""
        samples = rollouts(self.tokens // self.length, self.length, self.shape.vocab)
        scored = sum(int(((s.roles == TokenRole.ACTION) | (s.roles == TokenRole.ENV_OUTPUT)).sum()) for s in samples)
        engine = engine_of(self.device, self.shape, self.tokens, self.checkpointing)
        if naive:  # the model's own logits of every token, as a plain implementation has them
            engine._scorer.has_separate_head = False
        step = train_step(engine, samples, ObjectiveConfig(world_model_coeff=0.05))
        step()
        self.device.reset_peak()
        seconds = statistics.median(self.device.seconds(step) for _ in range(3))
        peak_gib = self.device.peak_gib()
        operations = self.shape.step_operations(self.tokens, self.length, self.tokens if naive else scored)
        tflops = operations / seconds / 1e12
        return {
            "tokens/s": self.tokens / seconds,
            "step s": seconds,
            "TFLOP/s": tflops,
            "share of the measured peak": tflops / self.peak_tflops,
            "recomputes": "yes" if self.checkpointing else "no",
            "memory GiB": peak_gib,
            "predicted GiB": self.predicted / GIB,
        }

    def share_of_world_term(self) -> Row:
        """Return the time of a step at coefficient 0.05 over that at 0, in alternation, with a 95 % interval."""
        samples = rollouts(self.tokens // self.length, self.length, self.shape.vocab)
        engine = engine_of(self.device, self.shape, self.tokens, self.checkpointing)
        on, off = (train_step(engine, samples, ObjectiveConfig(world_model_coeff=c)) for c in (0.05, 0.0))
        pairs = alternating(
            lambda: self.device.seconds(on), lambda: self.device.seconds(off), 10 if self.device.is_gpu else 6
        )
        return {"step, 0.05 over 0": list(ratio_interval(pairs)), "step s": statistics.mean(b for _, b in pairs)}


def uneven(device: Device, shape: Shape, how: str) -> Row:
    """Measure a step over rollouts of very uneven length: padded, packed, or with compiled layers."""
    model = shape.random_model(device.device, device.dtype)
    packing = how == "packed with flex attention"
    if packing:
        model.set_attn_implementation("flex_attention")
    config = TorchConfig(
        device=str(device.device), learning_rate=1e-7, max_tokens_per_microbatch=STEP_TOKENS,
        packing="on" if packing else "off", measure_gradients_every=0,
    )  # fmt: skip
    engine = TorchEngine(config, model=model)
    if how == "compiled":
        model.get_decoder().compile(dynamic=True)
    samples = [s for length in (512, 1024, 2048, 8192) for s in rollouts(8192 // length, length, shape.vocab)]
    step = train_step(engine, samples, ObjectiveConfig(world_model_coeff=0.05))
    first_s = device.seconds(step)
    device.reset_peak()
    seconds = statistics.median(device.seconds(step) for _ in range(3))
    tokens = sum(map(len, samples))
    return {"tokens/s": tokens / seconds, "step s": seconds, "first step s": first_s, "memory GiB": device.peak_gib()}


def engine_of(device: Device, shape: Shape, tokens: int, checkpointing: bool) -> TorchEngine:
    """Return an engine on random weights."""
    config = TorchConfig(
        device=str(device.device),
        learning_rate=1e-7,
        max_tokens_per_microbatch=tokens,
        gradient_checkpointing=checkpointing,
        lora_rank=shape.lora_rank,
        measure_gradients_every=0,
    )
    return TorchEngine(config, model=shape.random_model(device.device, device.dtype))


def train_step(engine: TorchEngine, samples: list[Sample], config: ObjectiveConfig) -> Callable[[], Any]:
    return lambda: asyncio.run(engine.train_step(samples, config))


def rollouts(count: int, length: int, vocab: int) -> list[Sample]:
    """Make rollouts of ``length`` tokens: a prompt, then turns of a 30-token action and a 100-token observation."""
    noise = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(noise.randrange(3, vocab) for _ in range(n))

    def trajectory(index: int) -> Trajectory:
        segments, left = [Segment(TokenRole.CONTEXT, ids(100))], length - 100
        while left > 0:
            action, output = min(left, 30), max(min(left - 30, 100), 0)
            segments.append(Segment(TokenRole.ACTION, ids(action), (-9.0,) * action, turn=len(segments)))
            segments += [Segment(TokenRole.ENV_OUTPUT, ids(output), turn=len(segments))] if output else []
            left -= action + output
        return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=float(index % 2))

    # One rollout alone would have no advantage, so it gets a sibling that is left out.
    trajectories = tuple(trajectory(i) for i in range(max(count, 2)))
    return build_samples(TrajectoryGroup("t", trajectories), ObjectiveConfig())[:count]


def head(device: Device, shape: Shape, tokens: int, name: str) -> Row:
    """Measure hidden states to log-probabilities and back by one method, memory above the inputs included."""
    sizes = argparse.Namespace(batch=1, length=tokens + 1, width=shape.hidden, vocab=shape.vocab, selected=0.75)
    problem = Problem(sizes, device.device, device.dtype)
    problem.weight.requires_grad_(name != "backtalk, frozen head")
    leaves = [problem.states, problem.weight]

    def once() -> None:
        for leaf in leaves:
            leaf.grad = None
        with device.device:
            result = METHODS[name](problem)
        result.backward(problem.upstream.to(result.dtype))

    try:
        once()
    except Exception as error:
        if name.startswith(("TRL", "Liger")):  # not installed, or not for this device
            return {"not measured": f"{type(error).__name__}: {error}".partition("\n")[0][:120]}
        raise
    device.reset_peak()
    before = torch.cuda.memory_allocated(device.device) / GIB if device.is_gpu else 0.0
    seconds = device.median_seconds(once, repeats=5 if device.is_gpu else 2)
    return {"step s": seconds, "memory GiB": device.peak_gib() - before, "is the base": "yes" if name == BASE else ""}
