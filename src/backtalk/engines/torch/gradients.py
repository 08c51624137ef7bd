"""The gradients of both terms of the objective over the trained weights, each by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backtalk.engines.metrics import StepRecord
from backtalk.objective.coefficient import Schedule, Share
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.gradients import TermGradients

# A measurement costs 1.64 updates as a pass of its own, and 0.67 under a share (benchmarks/objective.py norms). In a
# run that spends half of its time on updates, one step in 40 costs 2.1 %, and one in 12 under a share 2.8 %.
MEASURE_EVERY, MEASURE_EVERY_UNDER_SHARE = 40, 12


class GradientSum:
    """Sums of a gradient in float32 or wider, one tensor a trained weight, None where no loss reached it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self._parameters)

    def add(self, loss: Tensor, *, keep_graph: bool = False) -> None:
        """Run a backward pass and move the weights' ``.grad``, None before, into the sums.

        ``keep_graph`` leaves the graph for the other term.
        """
        loss.backward(retain_graph=keep_graph)
        for k, parameter in enumerate(self._parameters):
            if (grad := parameter.grad) is not None:
                grad = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
                before = self.sums[k]
                self.sums[k] = grad if before is None else before.add_(grad)
                parameter.grad = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """Gradients of a measured step, of policy_coeff * policy and of the world-model term at coefficient 1."""

    policy: GradientSum
    world: GradientSum
    losses: dict[str, float]  # both terms before their coefficients
    record: StepRecord
    measured: TermGradients

    def combine(self, config: ObjectiveConfig) -> tuple[dict[str, float], StepRecord, list[Tensor | None]]:
        """Return losses, record and gradient of the total loss. Call it once: it reuses the measured tensors."""
        if config.world.conflict == "project":
            self.project()
        coeff, losses = config.world_coeff, self.losses
        total = config.policy_coeff * losses["policy_loss"] + coeff * losses["world_model_loss"]
        self.record.scale_world(coeff)
        gradient = [_sum(p, w, coeff) for p, w in zip(self.policy.sums, self.world.sums, strict=True)]
        return losses | {"total_loss": total}, self.record, gradient

    def project(self) -> None:
        """Take off the world-model term's gradient what points against the policy term's (PCGrad, arXiv 2001.06782).

        That is done where their cosine over all weights is below 0: g_world -= (g_world . g_policy) / |g_policy|^2 *
        g_policy. The policy term's gradient stays as it is, where PCGrad itself projects both.
        """
        if not self.measured.cosine < 0:
            return
        share = self.measured.cosine * self.measured.world_norm / self.measured.policy_norm
        for k, (policy, world) in enumerate(zip(self.policy.sums, self.world.sums, strict=True)):
            if policy is not None:
                part = policy * -share
                self.world.sums[k] = part if world is None else world.add_(part)


def needs_both_terms(config: ObjectiveConfig, asked: float | Schedule | Share) -> bool:
    """Return whether an update is put together from both terms' gradients; ``asked`` is the coefficient in settings."""
    return isinstance(asked, Share) or (config.world.conflict == "project" and config.world_coeff > 0)


def steps_between_measurements(asked: int | None, config: ObjectiveConfig) -> int:
    """Return how many steps lie between two measurements of both terms' gradients; 0 for none at all."""
    if asked != 0 and config.world.conflict == "project" and config.world_model_coeff != 0:
        return 1
    if asked is None:
        return MEASURE_EVERY_UNDER_SHARE if isinstance(config.world_model_coeff, Share) else MEASURE_EVERY
    return asked


def _sum(policy: Tensor | None, world: Tensor | None, coeff: float) -> Tensor | None:
    if world is None:
        return policy
    return world.mul_(coeff) if policy is None else policy.add_(world, alpha=coeff)
