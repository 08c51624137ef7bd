"""The Tinker engine under test: steps on a local service, once for either reduction."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

from backtalk.engines.conformance import Step, StepResult, token_gradients
from backtalk.engines.conformance.base import Failure
from backtalk.engines.conformance.suite import without_observations
from backtalk.engines.tinker.config import Reduction, TinkerConfig
from backtalk.engines.tinker.engine import TinkerEngine
from backtalk.engines.tinker.local import LocalService
from backtalk.errors import ConfigError

REDUCTIONS: tuple[Reduction, ...] = ("sum", "row_mean")
AGREEMENT = 1e-6  # of both reductions, relative


class TinkerUnderTest:
    """The engine against the loss functions of the API as published, which is what it can be held to offline."""

    def __init__(self, model_folder: Path, reductions: tuple[Reduction, ...] = REDUCTIONS) -> None:
        self.reductions = reductions
        self._services = {reduction: LocalService(model_folder, reduction) for reduction in reductions}
        self._engines = {name: _engine(service) for name, service in self._services.items()}

    def train_step(self, step: Step) -> StepResult:
        """Take a step with Backtalk's objective under each reduction; both must give the same gradient."""
        if step.processes > 1:
            raise ConfigError("the engine is one process, and the service shards the model by itself")
        results = [self._take(step, reduction) for reduction in self.reductions]
        first = results[0]
        for other, name in zip(results[1:], self.reductions[1:], strict=True):
            pairs = zip(first.gradients, other.gradients, strict=True)
            if not all(math.isclose(a, b, rel_tol=AGREEMENT) for x, y in pairs for a, b in zip(x, y, strict=True)):
                raise Failure(f"the gradient is another one on a service that reduces by {name}")
        return first

    def own_grpo(self, step: Step) -> StepResult:
        """Take the step on samples that know of no observation."""
        bare = [replace(without_observations(sample), world_scale=None) for sample in step.samples]
        return self.train_step(replace(step, samples=bare, objective=replace(step.objective, world_model_coeff=0.0)))

    def _take(self, step: Step, reduction: Reduction) -> StepResult:
        service, engine = self._services[reduction], self._engines[reduction]
        service.max_rows = math.ceil(len(step.samples) / step.microbatches)
        metrics = asyncio.run(engine.train_step(step.samples, step.objective))
        gradient = service.models[0].gradients["lm_head.weight"]
        return StepResult(gradients=token_gradients(gradient, step.samples), metrics=[metrics], raw=[gradient])


def _engine(service: LocalService) -> TinkerEngine:
    """Return an engine that never moves its weights, so that it can take every step."""
    config = TinkerConfig(model=str(service.folder), learning_rate=0.0, reduction=service.reduction)
    return TinkerEngine(config, lambda: service)
