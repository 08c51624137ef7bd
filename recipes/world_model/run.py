"""Train a small model on a terminal's output alone: no verifier, no reward, no policy term.

    python recipes/world_model/run.py --out world_model

Writes results.json, curve.png and report.md into --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.language.renderer import Renderer
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import build_samples
from backtalk.trajectory import Trajectory, TrajectoryGroup
from backtalk.viewer.report.curves import finish, new_figure
from explore import Rollouts, record, shuffled
from measure import measure, predictions

OBJECTIVE = ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0)
SETS = {"trained": "rollouts trained on", "same_files": "same files, other commands", "new_files": "new files"}
BATCH = 32


async def learn(rollouts: Rollouts, trained: Sequence[Trajectory], args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm: ``steps`` optimizer steps on ``trained``, measured on the way; a seed gives the same numbers."""
    engine = TorchEngine(TorchConfig(model=args.model, learning_rate=args.learning_rate, warmup_steps=10))
    samples = [s for t in trained for s in build_samples(TrajectoryGroup(t.task_id, (t,)), OBJECTIVE)]
    order, curve = Random(f"order/{args.seed}"), []
    before = predictions(engine, rollouts.new_files, args.show)
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            found = {name: asdict(measure(engine, getattr(rollouts, name)[: args.measured])) for name in SETS}
            curve.append({"step": step, **found})
            print(
                f"step {step:4}: " + ", ".join(f"{k} {v['nats_per_token']:.2f}" for k, v in found.items()), flush=True
            )
        if step < args.steps:
            await engine.train_step(order.sample(samples, min(BATCH, len(samples))), OBJECTIVE)
    after = predictions(engine, rollouts.new_files, args.show)
    shown = [
        {"command": a.command, "truth": a.truth, "before": b.predicted, "after": a.predicted}
        for b, a in zip(before, after, strict=True)
    ]
    return {"curve": curve, "predictions": shown}


def draw(arms: dict[str, dict[str, Any]]) -> bytes:
    """Draw cross-entropy and token accuracy over steps, with the control dashed."""
    figure, (nats, accuracy) = new_figure(1, 2)
    colors = dict(zip(SETS, ("#8c959f", "#54aeff", "#cf222e"), strict=True))
    for arm, style in (("observations", "-"), ("shuffled", "--")):
        for name, label in SETS.items():
            rows = arms[arm]["curve"]
            steps, note = [row["step"] for row in rows], "" if arm == "observations" else " (shuffled)"
            nats.plot(steps, [r[name]["nats_per_token"] for r in rows], style, color=colors[name], label=label + note)
            accuracy.plot(steps, [r[name]["accuracy"] for r in rows], style, color=colors[name])
    nats.set(title="environment output, nats a token", xlabel="optimizer step", ylim=(0, None))
    accuracy.set(title="share of tokens predicted", xlabel="optimizer step", ylim=(0, 1))
    return finish(figure)


def report(arms: dict[str, dict[str, Any]], seconds: float) -> str:
    lines = ["# What the model knows of the terminal", "", f"{seconds:.0f} s in all.", ""]
    lines += [
        "| | | nats a token | without copied text | tokens right | observations right |",
        "|---|---|---|---|---|---|",
    ]
    for arm, when, at in (
        ("observations", "before", 0),
        ("observations", "after", -1),
        ("shuffled", "after, shuffled", -1),
    ):
        for name, label in SETS.items():
            m = arms[arm]["curve"][at][name]
            lines.append(
                f"| {label} | {when} | {m['nats_per_token']:.2f} | {m['nats_per_new_token']:.2f} | "
                f"{m['accuracy']:.0%} | {m['exact']:.0%} |"
            )
    lines += ["", "![curve](curve.png)", "", "## New files: the truth, and what was predicted", ""]
    for one in arms["observations"]["predictions"]:
        lines += [f"`{one['command']}`", ""]
        for name in ("truth", "before", "after"):
            lines += [f"{name}:", "", "```text", one[name].rstrip("\n"), "```", ""]
    return "\n".join(lines)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("world_model"))
    parser.add_argument("--model", default="base")
    parser.add_argument("--machines", type=int, default=128, help="machines trained on")
    parser.add_argument("--sessions", type=int, default=4, help="trained rollouts in each")
    parser.add_argument("--held-out", type=int, default=64, help="machines never trained on")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--measured", type=int, default=64, help="rollouts of each kind that are measured")
    parser.add_argument("--show", type=int, default=4, help="predictions to print")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    tokenizer = TorchEngine(TorchConfig(model=args.model)).tokenizer
    rollouts = await record(
        Renderer(tokenizer, ()), machines=args.machines, sessions=args.sessions, held_out=args.held_out, seed=args.seed
    )
    print(
        f"recorded {len(rollouts.trained)} + {len(rollouts.same_files)} + {len(rollouts.new_files)} rollouts",
        flush=True,
    )
    arms = {
        "observations": await learn(rollouts, rollouts.trained, args),
        "shuffled": await learn(rollouts, shuffled(rollouts.trained, args.seed), args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps({"settings": settings, "arms": arms}, indent=1) + "\n")
    (args.out / "curve.png").write_bytes(draw(arms))
    (args.out / "report.md").write_text(report(arms, time.monotonic() - started))
    print(f"wrote {args.out / 'report.md'}")


if __name__ == "__main__":
    asyncio.run(main())
