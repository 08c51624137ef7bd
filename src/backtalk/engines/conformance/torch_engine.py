"""The embedded engine under test: its gradient is read by a hook, from steps that it takes itself."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import torch

from backtalk.engines.conformance.base import Step, StepResult
from backtalk.engines.conformance.suite import without_observations
from backtalk.engines.conformance.table import token_gradients
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.errors import ConfigError


class TorchUnderTest:
    """The embedded engine, which is one process on one device."""

    def __init__(self, model_folder: Path) -> None:
        self.model_folder = model_folder
        self._engines: dict[int, TorchEngine] = {}  # by the size of micro-batches

    def train_step(self, step: Step) -> StepResult:
        if step.processes > 1:
            raise ConfigError("the embedded engine is one process on one device; use a host such as TRL for more")
        engine = self._engine(math.ceil(len(step.samples) / step.microbatches) * max(map(len, step.samples)))
        head = engine.model.get_output_embeddings().weight
        total = torch.zeros_like(head, requires_grad=False)
        hook = head.register_post_accumulate_grad_hook(lambda weight: _copy_gradient(weight, total))
        metrics = asyncio.run(engine.train_step(step.samples, step.objective))
        hook.remove()
        return StepResult(gradients=token_gradients(total, step.samples), metrics=[metrics], raw=[total])

    def _engine(self, max_tokens: int) -> TorchEngine:
        """Return an engine that never moves its weights, so that it can take every step."""
        if max_tokens not in self._engines:
            self._engines[max_tokens] = TorchEngine(
                TorchConfig(
                    model=str(self.model_folder),
                    device="cpu",
                    dtype="float32",
                    learning_rate=0.0,
                    max_tokens_per_microbatch=max_tokens,
                )
            )
        return self._engines[max_tokens]

    def own_grpo(self, step: Step) -> StepResult:
        """Take the step on samples that know of no observation."""
        bare = [replace(without_observations(sample), world_scale=None) for sample in step.samples]
        return self.train_step(replace(step, samples=bare, objective=replace(step.objective, world_model_coeff=0.0)))


def _copy_gradient(weight: torch.Tensor, total: torch.Tensor) -> None:
    """Copy what a backward pass accumulated; a gradient that is only measured leaves none."""
    if weight.grad is not None:
        total.copy_(weight.grad)
