"""Short real runs: the embedded model, and a pretrained model in a folder, through `train` with all its files."""

from __future__ import annotations

import asyncio
import math
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

from gpu_check.machine import Device
from gpu_check.results import Part, Row

NEEDED = ("pydantic", "tomli_w", "yaml", "pyarrow")


def run(part: Part, device: Device, model: str | None) -> None:
    """Train the embedded model on triage, or on a shell in this process where nothing isolates commands."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        part.not_reached.append(f"runs, which need {', '.join(missing)}: hand them over with --kit")
        return
    steps = 20 if device.is_gpu else 2
    for name, location in (("embedded model", "base"), ("pretrained model", model)):
        if location is None:
            continue
        part.measure(
            f"{name}, {steps} steps",
            lambda location=location: train_run(part.results.folder / "runs", device, location, steps),
            expected_s=150 if device.is_gpu else 30,
        )


def tasks_here() -> str:
    """Return the source of tasks that can run on this machine."""
    from backtalk.errors import SandboxUnavailable
    from backtalk.sandboxes import local_sandbox

    try:
        local_sandbox()
    except SandboxUnavailable:
        return "gpu_check.world:ShellWorld"
    return "triage"


def train_run(folder: Path, device: Device, model: str, steps: int) -> Row:
    """Train ``steps`` steps, half of them in a second process of the run (a resume), and return its metrics."""
    from backtalk.run.config import load_config
    from backtalk.run.log import RunLog
    from backtalk.run.train import train

    source = tasks_here()
    small: dict[str, Any] = {} if device.is_gpu else {"tasks_per_step": 2, "group_size": 2, "evaluation.tasks": 2}
    settings = {"engine.device": str(device.device), "engine.model": model, "tasks.source": source}
    settings |= {"evaluation.samples_per_task": 2, "evaluation.tasks": 32, "rollout.max_tokens": 1024} | small
    settings |= {"engine.learning_rate": 3e-4 if model == "base" else 1e-6}
    out = folder / Path(model).name
    number = sum(1 for _ in folder.glob(f"{out.name}*")) if folder.exists() else 0
    out = out.with_name(f"{out.name}-{number}")
    for last in (steps // 2, steps):
        config = load_config("triage", settings | {"steps": last})
        asyncio.run(train(config, out, resume=last == steps))
    rows = RunLog(out).read_metrics()

    def values(name: str, some: list[dict[str, Any]] = rows) -> list[float]:
        return [row[name] for row in some if row.get(name) is not None and math.isfinite(row[name])] or [math.nan]

    return {
        "tasks": source,
        "reward, first half": fmean(values("reward", rows[: len(rows) // 2])),
        "reward, second half": fmean(values("reward", rows[len(rows) // 2 :])),
        "environment's cross-entropy, first": values("env_output_ce")[0],
        "last": values("env_output_ce")[-1],
        "largest gap of sampler and trainer, nats": max(values("sampler_logprob_gap")),
        "rollouts s a step": median(values("rollout_seconds")),
        "update s a step": median(values("train_seconds")),
        "tokens/s": median(values("tokens_per_second")),
    }
