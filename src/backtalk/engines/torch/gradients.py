"""The gradient of one term of the objective over the trained weights, summed over the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientSum:
    """A gradient of its own, in float32 or wider, that leaves the weights' ``.grad`` as it is.

    ``sums`` has one tensor a trained weight, None where no loss reached it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self._parameters)

    def add(self, loss: Tensor, *, keep_graph: bool = False) -> None:
        """Add the gradient of a micro-batch's loss; ``keep_graph`` for another term to follow through the same one."""
        gradients = torch.autograd.grad(loss, self._parameters, retain_graph=keep_graph, allow_unused=True)
        for k, grad in enumerate(gradients):
            if grad is not None:
                grad = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
                before = self.sums[k]
                self.sums[k] = grad if before is None else before.add_(grad)
