"""An engine over a service under test: steps on services within the process, which tell the gradient they applied."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace

from backtalk.engines.conformance import Step, StepResult, token_gradients
from backtalk.engines.conformance.base import Failure
from backtalk.engines.conformance.suite import without_observations
from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.local import LocalService
from backtalk.errors import ConfigError

AGREEMENT = 1e-6  # of the services, relative


class RemoteUnderTest:
    """The engine against the loss functions of its API as published, which is what it can be held to offline.

    ``engines`` holds a service of each kind, by name, and the engine over it, which must never move its weights.
    """

    def __init__(self, engines: Mapping[str, tuple[LocalService, RemoteEngine]]) -> None:
        self.engines = engines

    def train_step(self, step: Step) -> StepResult:
        """Take a step with Backtalk's objective on each service; all must give the same gradient."""
        if step.processes > 1:
            raise ConfigError("the engine is one process, and the service shards the model by itself")
        results = {name: self._take(step, *pair) for name, pair in self.engines.items()}
        first = next(iter(results.values()))
        for name, other in results.items():
            pairs = zip(first.gradients, other.gradients, strict=True)
            if not all(math.isclose(a, b, rel_tol=AGREEMENT) for x, y in pairs for a, b in zip(x, y, strict=True)):
                raise Failure(f"the gradient is another one on a service that reduces by {name}")
        return first

    def own_grpo(self, step: Step) -> StepResult:
        """Take the step on samples that know of no observation."""
        bare = [replace(without_observations(sample), world_scale=None) for sample in step.samples]
        return self.train_step(replace(step, samples=bare, objective=replace(step.objective, world_model_coeff=0.0)))

    def _take(self, step: Step, service: LocalService, engine: RemoteEngine) -> StepResult:
        service.max_rows = math.ceil(len(step.samples) / step.microbatches)
        metrics = asyncio.run(engine.train_step(step.samples, step.objective))
        gradient = service.models[0].gradients["lm_head.weight"]
        return StepResult(gradients=token_gradients(gradient, step.samples), metrics=[metrics], raw=[gradient])
