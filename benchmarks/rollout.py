"""Measure rollouts a minute on triage from the embedded base model, and the parts of a step's time.

    python benchmarks/rollout.py --steps 8

Sampling includes the time that a rollout waits for its siblings, because a wave is sampled when all of them have asked.
The time of rollouts is split into what they spent in sampling and in the sandbox; training is wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
from pathlib import Path
from statistics import median

import torch

from backtalk.run.config import load_config
from backtalk.run.log import RunLog
from backtalk.run.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="triage")
    parser.add_argument("--model", default="base")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = {"steps": arguments.steps, "evaluation.tasks": 0, "engine.model": arguments.model}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.preset, overrides)
        asyncio.run(train(config, Path(folder) / "run"))
        rows = RunLog(Path(folder) / "run").read_metrics()[1:]  # the first step warms up
    rollout, learning = (median(row[name] for row in rows) for name in ("rollout_seconds", "train_seconds"))
    sampling = median(row["sampling_share"] for row in rows)
    whole = rollout + learning
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{config.tasks_per_step * config.group_size} rollouts a step, medians of {len(rows)} steps")
    print(f"step                {whole:6.2f} s")
    print(f"  sampling          {100 * rollout * sampling / whole:5.0f} %")
    print(f"  sandbox           {100 * rollout * (1 - sampling) / whole:5.0f} %")
    print(f"  training          {100 * learning / whole:5.0f} %")
    print(f"rollouts a minute   {60 * median(row['rollouts'] for row in rows) / whole:6.0f}")
    print(f"tokens a second     {median(row['tokens_per_second'] for row in rows):6.0f}")
    print(f"action tokens a second of rollout {median(row['action_tokens_per_second'] for row in rows):6.0f}")


if __name__ == "__main__":
    main()
