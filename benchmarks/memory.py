"""Measure memory and time of a training step on the CPU by model size and length, beside the prediction; one picture.

    python benchmarks/memory.py --picture docs/memory.png

A step is one micro-batch. Each point is a process of its own: its largest resident memory above that before the engine
was opened, which is the prediction's weights, gradients, AdamW's state, activations and buffers of the head.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
Point = tuple[float, float, float]  # predicted MiB, measured MiB, seconds of processor


def measure(shape: Shape, length: int, tokens: int, checkpointing: bool) -> Point:
    """Return the numbers of the second step, which AdamW's state is there for."""
    torch.set_num_threads(1)
    samples = rollouts(tokens // length, length, shape.vocab)
    release_memory()
    rest = memory("VmRSS")
    config = TorchConfig(
        device="cpu",
        learning_rate=1e-7,
        max_tokens_per_microbatch=tokens,
        gradient_checkpointing=checkpointing,
        measure_gradients_every=0,
    )
    engine = TorchEngine(config, model=shape.random_model(torch.device("cpu"), torch.float32))
    step = train_step(engine, samples, ObjectiveConfig(world_model_coeff=0.05))
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.process_time()
    step()
    predicted = shape.step_bytes(4, tokens, checkpointing=checkpointing) / 2**20
    return predicted, memory("VmHWM") - rest, time.process_time() - began


def draw(points: dict[tuple[str, bool, int], Point], tokens: int, picture: Path) -> None:
    """Draw memory and time by length: solid lines as measured, dashed ones as predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for number, shape in enumerate(SHAPES):
        for checkpointing, marker in ((False, "o"), (True, "s")):
            found = sorted((n, p) for (name, c, n), p in points.items() if (name, c) == (shape.name, checkpointing))
            lengths = [n for n, _ in found]
            label = shape.name + " gradient_checkpointing" * checkpointing
            style = {"color": f"C{number}", "alpha": 0.5 if checkpointing else 1.0}
            axes[0].plot(lengths, [p[1] for _, p in found], f"{marker}-", label=label, **style)
            axes[0].plot(lengths, [p[0] for _, p in found], "x--", **style)
            axes[1].plot(lengths, [p[2] for _, p in found], f"{marker}-", label=label, **style)
    titles = ("largest memory of a step, MiB (dashed: predicted)", "seconds of processor of a step")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"tokens of a rollout; {tokens:,} in the step")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--picture", type=Path, default=Path("memory.png"))
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f} before\n")
    print("| weights | tokens of a rollout | recomputes | predicted MiB | measured MiB | ratio | processor s |")
    print("|---|---|---|---|---|---|---|")
    points: dict[tuple[str, bool, int], Point] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_check.speed", "transformers.models.qwen3.modeling_qwen3"])
    for shape in SHAPES:
        for checkpointing in (False, True):
            for length in args.lengths:
                with ProcessPoolExecutor(1, context) as pool:
                    point = pool.submit(measure, shape, length, args.tokens, checkpointing).result()
                points[shape.name, checkpointing, length] = point
                predicted, measured, seconds = point
                print(
                    f"| {shape.name} | {length:,} | {'yes' if checkpointing else 'no'} | {predicted:,.0f} | "
                    f"{measured:,.0f} | {measured / predicted:.2f} | {seconds:.1f} |",
                    flush=True,
                )
    draw(points, args.tokens, args.picture)


if __name__ == "__main__":
    main()
