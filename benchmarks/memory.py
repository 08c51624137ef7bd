"""Measure memory and time of a training step on the CPU by model size and length, beside the prediction; one picture.

    python benchmarks/memory.py --picture docs/memory.png

A step is one micro-batch. Each point is two processes of its own: their largest resident memory above that before the
engine was opened, after a small step of another one. In the first, every tensor over 1 MiB has pages of its own, so
that it holds what the prediction counts: weights, gradients, AdamW's state, activations and buffers of the head. The
second has glibc's own settings: what it holds beyond the first are holes between tensors. Time is predicted from the
step's operations, at the speed of one large matrix product.

What was measured lies in a file beside the picture, and is not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TypeVar

import torch
from gpu_check.shapes import Shape
from gpu_check.speed import rollouts, train_step

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.memory import release_memory
from backtalk.objective.config import ObjectiveConfig
from objective import memory

SHAPES = (
    Shape(name="1M", hidden=128, layers=4, heads=4, kv_heads=4, head_size=32, mlp=320, vocab=1488),
    Shape(name="6M", hidden=256, layers=6, heads=8, kv_heads=4, head_size=32, mlp=768, vocab=4096),
    Shape(name="25M", hidden=512, layers=6, heads=8, kv_heads=4, head_size=64, mlp=1792, vocab=8192),
)
PROMPT_TOKENS = 100  # of each rollout; all others are scored
OBJECTIVE = ObjectiveConfig(world_model_coeff=0.05)
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
T = TypeVar("T")
Point = dict[str, float]  # MiB as predicted, of tensors and with holes; seconds of processor as predicted and measured


def measure(shape: Shape, length: int, tokens: int, checkpointing: bool, own_pages: bool) -> tuple[float, float]:
    """Return MiB and seconds of processor of a step, after a small one that AdamW's state is there from."""
    torch.set_num_threads(1)
    if own_pages and not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20):
        raise OSError("this C library has no M_MMAP_THRESHOLD; it takes glibc")
    small = rollouts(2, 256, shape.vocab)
    train_step(engine_of(shape, tokens, checkpointing), small, OBJECTIVE)()  # loads libraries
    gc.collect()
    release_memory()
    rest = memory("VmRSS")
    engine = engine_of(shape, tokens, checkpointing)
    train_step(engine, small, OBJECTIVE)()
    step = train_step(engine, rollouts(tokens // length, length, shape.vocab), OBJECTIVE)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.process_time()
    step()
    return memory("VmHWM") - rest, time.process_time() - began


def engine_of(shape: Shape, tokens: int, checkpointing: bool) -> TorchEngine:
    """Return an engine with random weights."""
    config = TorchConfig(
        device="cpu",
        learning_rate=1e-7,
        max_tokens_per_microbatch=tokens,
        gradient_checkpointing=checkpointing,
        measure_gradients_every=0,
    )
    return TorchEngine(config, model=shape.random_model(torch.device("cpu"), torch.float32))


def operations(shape: Shape, length: int, tokens: int, checkpointing: bool) -> float:
    """Return the operations of a step, those of what is computed again included."""
    once = shape.step_operations(tokens, length, tokens - PROMPT_TOKENS * (tokens // length))
    again = 2.0 * shape.body * tokens + shape.attention_operations(tokens, length) / 3
    return once + again * checkpointing


def matrix_product() -> float:
    """Return the operations a second of processor of a matrix product in float32, the median of five."""
    torch.set_num_threads(1)
    left, right = torch.rand(2048, 2048), torch.rand(2048, 2048)
    speeds = []
    for _ in range(6):
        began = time.process_time()
        torch.mm(left, right)
        speeds.append(2 * 2048**3 / (time.process_time() - began))
    return sorted(speeds[1:])[2]


def in_process(context: BaseContext, function: Callable[..., T], *arguments: object) -> T:
    """Return what a function returns in a new process."""
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def draw(points: dict[str, Point], all_lengths: list[int], tokens: int, picture: Path) -> None:
    """Draw memory and time by length: solid lines as measured, dashed ones as predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, shape in enumerate(SHAPES):
        for checkpointing, marker in ((False, "o"), (True, "s")):
            keys = {length: key_of(shape, length, tokens, checkpointing) for length in all_lengths}
            lengths = [length for length in all_lengths if keys[length] in points]
            found = [points[keys[length]] for length in lengths]
            style = {"color": f"C{number}", "alpha": 0.5 if checkpointing else 1.0}
            label = shape.name + " recomputing" * checkpointing
            for axis, measured, predicted in ((axes[0], "tensors", "predicted"), (axes[1], "s", "predicted_s")):
                axis.plot(lengths, [p[measured] for p in found], f"{marker}-", label=label, **style)
                axis.plot(lengths, [p[predicted] for p in found], "--", **style)
    titles = (
        "largest memory of a step, MiB (dashed: predicted)",
        "processor seconds of a step (dashed: at the speed of a matrix product)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"tokens of a rollout; {tokens:,} in the step")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7, ncols=3, loc="lower center")
    axes[0].set_ylim(bottom=40)
    figure.savefig(picture, dpi=110)


def key_of(shape: Shape, length: int, tokens: int, checkpointing: bool) -> str:
    """Return the name of a point in the file."""
    return f"{shape.name}, {length} of {tokens} tokens" + ", recomputing" * checkpointing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--picture", type=Path, default=Path("memory.png"))
    args = parser.parse_args()
    kept = args.picture.with_suffix(".json")
    points: dict[str, Point] = json.loads(kept.read_text()) if kept.exists() else {}
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f} before\n")
    print("| weights | tokens of a rollout | recomputes | predicted MiB | tensors | with holes | predicted s | s |")
    print("|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_check.speed", "transformers.models.qwen3.modeling_qwen3"])
    for shape in [shape for shape in SHAPES if shape.name in args.shapes]:
        for checkpointing in (False, True):
            for length in args.lengths:
                key, step = key_of(shape, length, args.tokens, checkpointing), (length, args.tokens, checkpointing)
                if key not in points:
                    speed = in_process(context, matrix_product)
                    tensors, seconds = in_process(context, measure, shape, *step, True)
                    holes, _ = in_process(context, measure, shape, *step, False)
                    points[key] = {"tensors": tensors, "with_holes": holes, "s": seconds, "speed": speed}
                point = points[key]
                point["predicted"] = shape.step_bytes(4, args.tokens, checkpointing=checkpointing) / 2**20
                point["predicted_s"] = operations(shape, *step) / point["speed"]
                kept.write_text(json.dumps(points, indent=1) + "\n")
                print(
                    f"| {shape.name} | {length:,} | {'yes' if checkpointing else 'no'} | {point['predicted']:,.0f} | "
                    f"{point['tensors']:,.0f} | {point['with_holes']:,.0f} | {point['predicted_s']:.1f} | "
                    f"{point['s']:.1f} |",
                    flush=True,
                )
    draw(points, args.lengths, args.tokens, args.picture)


if __name__ == "__main__":
    main()
