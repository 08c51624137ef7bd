"""Measure what a fixed coefficient and a share do to models of several sizes, fresh ones and ones taught both halves.

    python recipes/share/measure.py --models sizes --out share

``sizes`` holds a folder for each model, named KIND_SIZE as in README.md. Each is trained for a few steps of triage with
each setting of ``world_model_coeff``, and both terms' gradients over all weights are measured in every step.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

from backtalk.run.config import load_config
from backtalk.run.log import RunLog
from backtalk.run.train import train
from backtalk.viewer.web.curves import new_figure

SETTINGS = {"0.05": "0.05", "share 0.2": "{share: 0.2}"}
KINDS = {"actions": "fresh", "both": "both halves"}  # of triage: the explorers' tokens alone were learned, or all


def parameters(model: Path) -> int:
    """Count the parameters of a model folder."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def measure(model: Path, recorded: Path, coefficient: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train a model for a few steps; return both terms' gradient norms of each step, and the cross-entropies."""
    overrides = {
        "steps": str(steps),
        "tasks_per_step": "4",
        "evaluation.tasks": "32",
        "evaluation.samples_per_task": "1",
        "evaluation.recorded_path": str(recorded),
        "engine.model": str(model),
        "engine.measure_gradients_every": "1",
        "engine.warmup_steps": "0",
        "objective.world_model_coeff": coefficient,
    }
    began = time.monotonic()
    config = load_config("triage", overrides=[f"{key}={value}" for key, value in overrides.items()])
    shutil.rmtree(folder, ignore_errors=True)
    asyncio.run(train(config, folder))
    log = RunLog(folder)
    names = ("world_model_coeff", "world_grad_share", "policy_grad_norm_weights", "world_grad_norm_weights", "reward")
    rows = [{name: row.get(name) for name in names} for row in log.read_metrics()]
    evaluations = [log.read_evaluation(step) for step in log.evaluation_steps()]
    return {
        "steps": rows,
        "recorded_ce": [evaluation["env_ce_recorded"]["value"] for evaluation in evaluations],
        "pass_at_1": [evaluation["pass_at_1"]["value"] for evaluation in evaluations],
        "seconds": time.monotonic() - began,
    }


def shares(result: dict[str, Any]) -> list[float]:
    """Return the world-model term's share of the gradient over the weights, of each step that had both terms."""
    return [row["world_grad_share"] for row in result["steps"] if row["policy_grad_norm_weights"]]


def draw(results: list[dict[str, Any]]) -> bytes:
    """Draw the realised share of each model, and what it did to the cross-entropy, for both settings."""
    figure, (share, effect) = new_figure(1, 2, width=5.0, height=3.8)
    for setting, color in zip(SETTINGS, ("#cf222e", "#0969da"), strict=True):
        for (kind, name), style in zip(KINDS.items(), ("o--", "s-"), strict=True):
            chosen = [r for r in results if (r["kind"], r["setting"]) == (kind, setting)]
            sizes, label = [r["parameters"] for r in chosen], f"{setting}, {name}"
            middle = [statistics.median(shares(r)) for r in chosen]
            low_high = [[abs(m - end(shares(r))) for r, m in zip(chosen, middle, strict=True)] for end in (min, max)]
            share.errorbar(sizes, middle, low_high, fmt=style, color=color, capsize=3, label=label)
            effect.plot(sizes, [r["recorded_ce"][-1] - r["recorded_ce"][0] for r in chosen], style, color=color)
    share.axhline(0.2, color="#8c959f", linewidth=1, linestyle=":")
    share.set(title="share of the gradient: median, least and most of the steps", ylim=(0, 1))
    effect.set(title="cross-entropy of recorded output, change in nats a token")
    effect.axhline(0, color="#8c959f", linewidth=1, linestyle=":")
    all_sizes = sorted({r["parameters"] for r in results})
    for axis in (share, effect):
        axis.set_xscale("log")
        axis.set_xticks(all_sizes, [f"{size / 1e6:.2f} M" for size in all_sizes])
        axis.minorticks_off()
        axis.set_xlabel("parameters", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    share.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("sizes"), help="holds KIND_SIZE/base_model for each model")
    parser.add_argument("--out", type=Path, default=Path("share"))
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    results = []
    for kind in KINDS:
        for folder in sorted(args.models.glob(f"{kind}_*"), key=lambda folder: parameters(folder / "base_model")):
            model, recorded = folder / "base_model", folder / "recorded/held_out.parquet"
            for setting, coefficient in SETTINGS.items():
                run = args.out / "runs" / f"{folder.name}_{setting.replace(' ', '_')}"
                result = measure(model, recorded, coefficient, run, args.steps)
                about = {"kind": kind, "model": folder.name, "parameters": parameters(model), "setting": setting}
                results.append(about | result)
                before, after = result["recorded_ce"]
                print(
                    f"{folder.name:16} {setting:10} share {statistics.median(shares(result)):.2f}  "
                    f"recorded CE {before:.2f} to {after:.2f}  {result['seconds']:.0f} s",
                    flush=True,
                )
                (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "share.png").write_bytes(draw(results))


if __name__ == "__main__":
    main()
