"""The gradients of both terms of the objective over the trained weights, each by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backtalk.engines.metrics import StepRecord
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.gradients import TermGradients


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
        coeff, losses = config.world_coeff, self.losses
        total = config.policy_coeff * losses["policy_loss"] + coeff * losses["world_model_loss"]
        self.record.scale_world(coeff)
        gradient = [_sum(p, w, coeff) for p, w in zip(self.policy.sums, self.world.sums, strict=True)]
        return losses | {"total_loss": total}, self.record, gradient


def _sum(policy: Tensor | None, world: Tensor | None, coeff: float) -> Tensor | None:
    if world is None:
        return policy
    return world.mul_(coeff) if policy is None else policy.add_(world, alpha=coeff)
