"""TRL under test: one optimizer step by its own training loop, on one process or on two with gloo.

python -m backtalk.hosts.trl.conformance FOLDER    is one process of several; torchrun's variables say which.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from backtalk.engines.conformance import Step, StepResult, token_gradients
from backtalk.errors import ConfigError
from backtalk.hosts.trl.rows import ROLLOUTS, SCALES, WEIGHTS
from backtalk.hosts.trl.trainer import EchoGRPOTrainer
from backtalk.objective.config import ObjectiveConfig, PolicyOptions
from backtalk.objective.samples import Sample

LOSS_TYPES = {"sequence_mean": "grpo", "token_mean": "dapo", "fixed_length": "dr_grpo"}  # by policy_normalizer
_TIMEOUT_S = 1200


class TrlUnderTest:
    """``EchoGRPOTrainer`` on Backtalk's own rollouts, and ``GRPOTrainer`` on the same tensors."""

    def __init__(self, model_folder: Path) -> None:
        self.model_folder = model_folder

    def train_step(self, step: Step) -> StepResult:
        if step.processes == 1:
            gradient, metrics = take_step(self.model_folder, step, step.samples)
            return StepResult(gradients=token_gradients(gradient, step.samples), metrics=[metrics], raw=[gradient])
        results = _in_processes(self.model_folder, step)
        return StepResult(
            gradients=token_gradients(results[0][0], step.samples),
            metrics=[metrics for _, metrics in results],
            raw=[gradient for gradient, _ in results],
        )

    def own_grpo(self, step: Step) -> StepResult:
        gradient, metrics = take_step(self.model_folder, step, step.samples, plain=True)
        return StepResult(gradients=token_gradients(gradient, step.samples), metrics=[metrics], raw=[gradient])


class PlainTrainer(GRPOTrainer):
    """TRL's own trainer, which gets its batch from Backtalk and knows of no world-model term."""

    objective: ObjectiveConfig
    rollouts: Any

    def _generate_and_score_completions(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        output = EchoGRPOTrainer._own_rollouts(self, inputs)  # type: ignore[arg-type]
        return {name: value for name, value in output.items() if name not in (ROLLOUTS, SCALES, WEIGHTS)}


def take_step(
    model_folder: Path, step: Step, samples: Sequence[Sample], *, plain: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient of the head before clipping, and TRL's log of the step.

    Raises:
        ConfigError: an objective that TRL has no loss type for.
    """
    config = step.objective
    if config.policy != PolicyOptions() or config.policy_coeff != 1:
        raise ConfigError("the policy term is TRL's own; set its loss_type, epsilon and beta")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    def rollouts(inputs: Any, trainer: Any) -> Sequence[Sample]:
        torch.manual_seed(0)  # TRL shuffles the batch next
        return samples

    with tempfile.TemporaryDirectory(prefix="backtalk-trl-") as folder:
        args: Any = _arguments(folder, step, len(samples))
        common: dict[str, Any] = {
            "model": model,
            "args": args,
            "train_dataset": Dataset.from_list([{"prompt": "w2"}] * args.generation_batch_size),
            "processing_class": AutoTokenizer.from_pretrained(model_folder),
        }
        if plain:
            trainer: Any = PlainTrainer(reward_funcs=lambda completions, **_: [None] * len(completions), **common)
            trainer.objective, trainer.rollouts = config, rollouts
        else:
            trainer = EchoGRPOTrainer(
                rollouts=rollouts,
                world_model_coeff=config.world_coeff,
                world_normalizer=config.world_normalizer,
                world_loss_target=config.world_loss_target,
                max_seq_len=config.max_seq_len,
                world=config.world,
                **common,
            )
        reader = _Reader(model)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(reader)
        trainer.train()
    assert reader.gradient is not None
    return reader.gradient, reader.metrics


class _Reader(TrainerCallback):
    """Reads the gradient before the optimizer does, and the log."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gradient: Tensor | None = None
        self.metrics: dict[str, float] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Copy the gradient of the head."""
        self.gradient = self.model.lm_head.weight.grad.detach().clone()

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Keep the log of the step, and leave out that of the end of training."""
        if "train_runtime" not in logs:
            self.metrics |= logs


def cpu_config(folder: Path | str, **settings: Any) -> GRPOConfig:
    """Return TRL's settings of a run on the CPU in float32 that saves nothing and logs every step."""
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "temperature": 1.0,
        "beta": 0.0,
    }
    return GRPOConfig(**fixed | settings)


def _arguments(folder: str, step: Step, count: int) -> GRPOConfig:
    """Return TRL's settings for one step of ``count`` samples a process."""
    parts = step.microbatches
    rows = max(math.ceil(count / parts), 1)
    config = step.objective
    batch = rows * parts * step.processes
    if batch < 2:
        raise ConfigError("TRL takes at least two rows a step")
    return cpu_config(
        folder,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=parts,
        generation_batch_size=batch,
        num_generations=batch,
        loss_type=LOSS_TYPES[config.policy_normalizer],
        epsilon=config.clip[0],
        epsilon_high=config.clip[1],
        max_completion_length=config.max_seq_len or 256,
        remove_unused_columns=False,
    )


def _in_processes(model_folder: Path, step: Step) -> list[tuple[Tensor, dict[str, float]]]:
    """Take a step on several processes, each of which gets its share of the samples; return what each of them saw."""
    with tempfile.TemporaryDirectory(prefix="backtalk-trl-") as name:
        folder = Path(name)
        (folder / "step").write_bytes(pickle.dumps((model_folder, step)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(step.processes)}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "backtalk.hosts.trl.conformance", name],
                env=os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(step.processes)
        ]
        try:
            errors = [child.communicate(timeout=_TIMEOUT_S)[1] for child in children]
        finally:
            for child in children:
                child.kill()
        if failed := [error for child, error in zip(children, errors, strict=True) if child.returncode]:
            raise RuntimeError(f"{len(failed)} processes failed: " + "\n".join(error[-1500:] for error in failed))
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(step.processes)]


def _child(folder: Path) -> None:
    """Take this process's part of a step."""
    model_folder, step = pickle.loads((folder / "step").read_bytes())
    rank, share = int(os.environ["RANK"]), math.ceil(len(step.samples) / step.processes)
    result = take_step(model_folder, step, step.samples[rank * share : (rank + 1) * share])
    torch.save(result, folder / f"result-{rank}")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
