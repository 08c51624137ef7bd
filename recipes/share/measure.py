"""Measure what a fixed coefficient and a share are: on models of several sizes, fresh ones and ones taught both halves,
with the normalisers of several libraries.

    python recipes/share/measure.py norms --models sizes --out share      # the gradients of the model as it is
    python recipes/share/measure.py trained --models sizes --out share    # a few steps of training

``sizes`` holds a folder for each model, named KIND_SIZE as in README.md. What is measured already is
not measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.objective.coefficient import CoefficientController, Share
from backtalk.objective.config import ObjectiveConfig, PolicyOptions
from backtalk.objective.samples import build_samples
from backtalk.run.config import load_config
from backtalk.run.log import RunLog
from backtalk.run.train import train

FIXED, SHARE = 0.05, Share(0.2)
COEFFICIENTS = {"0.05": "0.05", "share 0.2": "{share: 0.2}"}
KINDS = ("actions", "both")  # of triage: the explorers' tokens alone were learned, or all
MAX_TOKENS = 1024  # of the preset: the L of fixed_length

BOTH_TOKEN_MEAN = {"policy_normalizer": "token_mean", "world_normalizer": "token_mean"}
BOTH_FIXED_LENGTH = {"policy_normalizer": "fixed_length", "world_normalizer": "fixed_length"}
NORMALISERS: Mapping[str, Mapping[str, str]] = {  # settings of the objective; docs/coefficients.md says whose they are
    "sequence_mean": {},
    "world: sequence_mean_selected": {"world_normalizer": "sequence_mean_selected"},
    "world: token_mean": {"world_normalizer": "token_mean"},
    "world: fixed_length": {"world_normalizer": "fixed_length"},
    "token_mean": BOTH_TOKEN_MEAN,
    "fixed_length": BOTH_FIXED_LENGTH,
    "token_mean, raw advantages": BOTH_TOKEN_MEAN | {"policy.advantage": "dr_grpo"},
    "fixed_length, raw advantages": BOTH_FIXED_LENGTH | {"policy.advantage": "dr_grpo"},
    "target: warning_plus_env": {"world_loss_target": "warning_plus_env"},
    "target: full_observation": {"world_loss_target": "full_observation"},
}
# The least and the most by ``norms`` on the base model of the package, and the default.
TRAINED = ("world: fixed_length", "token_mean, raw advantages", "sequence_mean")


def parameters(model: Path) -> int:
    """Count the parameters of a model folder."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def run(model: Path, folder: Path, overrides: Mapping[str, str]) -> RunLog:
    """Train a model on triage, 4 tasks x 8 rollouts a step, with both terms' gradients measured in each."""
    settings = {"tasks_per_step": "4", "engine.model": str(model), "engine.warmup_steps": "0"}
    settings = {**settings, "engine.measure_gradients_every": "1", **overrides}
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config("triage", overrides=[f"{key}={value}" for key, value in settings.items()])
    asyncio.run(train(config, folder))
    return RunLog(folder)


def norms(model: Path, folder: Path, steps: int) -> dict[str, list[dict[str, float]]]:
    """Return both terms' gradient norms with each normaliser, on the same rollouts of the model as it is.

    At a learning rate of 0 the weights stay. ``kept`` is the share that a controller keeps which has seen the batches
    before this one, NaN in the first.
    """
    log = run(model, folder, {"steps": str(steps), "evaluation.tasks": "0", "engine.learning_rate": "0"})
    batches = [log.read_groups(step) for step in log.group_steps()]
    engine = TorchEngine(TorchConfig(model=str(model), learning_rate=0.0, measure_gradients_every=1))
    found: dict[str, list[dict[str, float]]] = {}
    for name, settings in NORMALISERS.items():
        options = {key: value for key, value in settings.items() if key != "policy.advantage"}
        policy = PolicyOptions(advantage=settings.get("policy.advantage", "grpo"))  # type: ignore[arg-type]
        config = ObjectiveConfig(world_model_coeff=SHARE, max_seq_len=MAX_TOKENS, policy=policy, **options)  # type: ignore[arg-type]
        controller, rows = CoefficientController(), []
        for groups in batches:
            samples = [sample for group in groups for sample in build_samples(group, config)]
            metrics = asyncio.run(engine.train_step(samples, config))
            p, w = metrics["policy_grad_norm_weights"], metrics["world_grad_norm_weights"]
            if not p > 0:  # a batch without a mixed group
                continue
            coeff = controller.coefficient(SHARE, 0) if rows else math.nan
            controller.observe(p, w)
            rows.append({"policy": p, "world": w, "fixed": world_share(FIXED, p, w), "kept": world_share(coeff, p, w)})
        found[name] = rows
    return found


def world_share(coeff: float, policy: float, world: float) -> float:
    """Return the world-model term's share of the gradient at a coefficient."""
    return coeff * world / (coeff * world + policy)


def trained(model: Path, folder: Path, steps: int, settings: Mapping[str, str]) -> dict[str, Any]:
    """Train a model for a few steps; return what the term was and did.

    ``share`` is [median, least, most] of the steps that had a gradient of both terms, ``coefficients`` [least, most],
    ``recorded_ce`` [before, after].
    """
    measured = {"steps": str(steps), "evaluation.tasks": "32", "evaluation.samples_per_task": "1"}
    log = run(model, folder, {**measured, **settings})
    rows = log.read_metrics()
    shares = [row["world_grad_share"] for row in rows if row["policy_grad_norm_weights"]] or [math.nan]
    coefficients = [row["world_model_coeff"] for row in rows]
    evaluations = [log.read_evaluation(step) for step in log.evaluation_steps()]
    return {
        "steps": steps,
        "share": [statistics.median(shares), min(shares), max(shares)],
        "coefficients": [min(coefficients), max(coefficients)],
        "recorded_ce": [evaluation["env_ce_recorded"]["value"] for evaluation in evaluations],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("norms", "trained"))
    parser.add_argument("--models", type=Path, default=Path("sizes"), help="holds KIND_SIZE/base_model for each model")
    parser.add_argument("--out", type=Path, default=Path("share"))
    parser.add_argument("--steps", type=int, help="batches of rollouts (4), or steps of training (8)")
    args = parser.parse_args()
    file = args.out / f"{args.part}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    folders = [folder for kind in KINDS for folder in args.models.glob(f"{kind}_*") if (folder / "base_model").exists()]

    def keep(name: str, model: Path, result: Any, line: str, began: float) -> None:
        results[name] = {"model": model.parent.name, "parameters": parameters(model), "result": result}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:60} {line}  {time.monotonic() - began:.0f} s", flush=True)

    for folder in sorted(folders, key=lambda folder: parameters(folder / "base_model")):
        model, began = folder / "base_model", time.monotonic()
        if args.part == "norms":
            if folder.name not in results:
                result = norms(model, args.out / "runs" / f"{folder.name}_norms", args.steps or 4)
                middle = [statistics.median(row["fixed"] for row in rows) for rows in result.values() if rows]
                keep(folder.name, model, result, "0.05: " + " ".join(f"{share:.3f}" for share in middle), began)
            continue
        for normaliser in TRAINED:
            for coefficient, value in COEFFICIENTS.items():
                name, began = f"{folder.name}/{normaliser}/{coefficient}", time.monotonic()
                if name in results:
                    continue
                settings = {f"objective.{key}": choice for key, choice in NORMALISERS[normaliser].items()}
                settings["objective.world_model_coeff"] = value
                result = trained(model, args.out / "runs" / name.replace(" ", "_"), args.steps or 8, settings)
                before, after = result["recorded_ce"]
                line = f"share {result['share'][0]:.2f}  recorded CE {before:.2f} to {after:.2f}"
                keep(name, model, result | {"normaliser": normaliser, "coefficient": coefficient}, line, began)


if __name__ == "__main__":
    main()
