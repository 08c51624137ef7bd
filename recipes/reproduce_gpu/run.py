"""Train a real pretrained model on one GPU with GRPO, with the world-model term and with its placebo, in short parts.

    python recipes/reproduce_gpu/run.py                       # Qwen/Qwen3-0.6B from the hub
    python recipes/reproduce_gpu/run.py --model FOLDER        # a folder that was handed over
    python recipes/reproduce_gpu/run.py --device cpu          # the same, smaller, with the embedded base model

A part ends after --minutes (9), with its run saved; the same command does the next part, until study.json is there. It
exits with 0 when all is done and with 75 when there is more to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtalk.engines.torch.model import resolve_device
from backtalk.evidence.arms import read_arms
from backtalk.evidence.study import Study, StudyEvent, StudyProgress, run_study
from backtalk.run.settings_file import parse_overrides

ARMS = ("grpo", "echo", "shuffled")
MORE_TO_DO = 75
ON_GPU: dict[str, Any] = {
    "steps": 60,
    "tasks_per_step": 8,
    "group_size": 8,
    "checkpoint_every": 1,
    "evaluation.tasks": 64,
    "evaluation.samples_per_task": 2,
    "evaluation.every": 20,
    "tasks.levels": [1, 2],
    "rollout.max_turns": 8,
    "rollout.max_tokens": 4096,
    "rollout.max_tokens_per_turn": 256,
    "engine.max_tokens_per_microbatch": "auto",
    "engine.measure_gradients_every": 5,
    "objective.world_model_coeff": {"share": 0.2},
}
ON_CPU: dict[str, Any] = {
    "steps": 2,
    "tasks_per_step": 2,
    "group_size": 2,
    "evaluation.tasks": 2,
    "evaluation.samples_per_task": 1,
    "evaluation.every": 0,
    "rollout.max_turns": 3,
    "rollout.max_tokens": 640,
    "rollout.max_tokens_per_turn": 48,
    "engine.max_tokens_per_microbatch": 8192,
    "engine.learning_rate": 3e-4,
}


def make_study(args: argparse.Namespace, is_gpu: bool) -> Study:
    """Return the study that the arguments ask for."""
    model = args.model or ("Qwen/Qwen3-0.6B" if is_gpu else "base")
    settings = {**ON_GPU, **({} if is_gpu else ON_CPU), "engine.model": model, "engine.device": args.device}
    settings |= {} if args.tasks is None else {"tasks.source": args.tasks}
    return Study(
        name="reproduce_gpu",
        base="qwen3-0.6b" if is_gpu else "triage",
        arms=read_arms(args.arm or list(ARMS), "recipes/reproduce_gpu"),
        seeds=tuple(args.seed or (0, 1, 2)),
        settings=settings | parse_overrides(args.set or ()),
    )


async def do_part(study: Study, out: Path, seconds: float) -> bool:
    """Train until all is done or the time is over; return whether all is done."""
    try:
        async with asyncio.timeout(seconds):
            await run_study(study, out, parallel=1, on_event=show)
    except TimeoutError:
        return False
    return True


def show(event: StudyEvent) -> None:
    """Print a line for each step that is done."""
    if isinstance(event, StudyProgress):
        reward = event.metrics.get("reward")
        print(f"{event.run}  step {event.step}/{event.steps}  reward {reward}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one part, and add what it ran on to parts.jsonl."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model, or its name on the hub")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; auto is the first GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/reproduce_gpu")))
    parser.add_argument("--minutes", type=float, default=9.0, help="most minutes of a part, less one to save a run")
    parser.add_argument("--tasks", help="another source of tasks, where this machine has no sandboxes")
    parser.add_argument("--arm", action="append", choices=ARMS, help="some of the arms, the first compared with")
    parser.add_argument("--seed", type=int, action="append", help="seeds instead of 0, 1 and 2")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a setting of every run")
    args = parser.parse_args(arguments)
    device, started = resolve_device(args.device), time.monotonic()
    study = make_study(args, device.type == "cuda")
    is_done = asyncio.run(do_part(study, args.out, 60 * args.minutes))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()}-core CPU"
    part = {"device": name, "torch": torch.__version__, "seconds": time.monotonic() - started, "done": is_done}
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "parts.jsonl", "a") as file:
        file.write(json.dumps(part) + "\n")
    print(f"done: {args.out / 'study.json'}" if is_done else "more to do: start the same command again")
    return 0 if is_done else MORE_TO_DO


if __name__ == "__main__":
    raise SystemExit(main())
