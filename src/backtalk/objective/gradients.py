"""Norms of the two terms' gradients over all trained weights, and the angle between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TermGradients:
    """Sizes of both terms' gradients over all trained weights in one optimizer step."""

    policy_norm: float  # of policy_coeff * policy term
    world_norm: float  # of the world-model term at coefficient 1
    cosine: float  # NaN where one of them is 0

    def world_share(self, coeff: float) -> float:
        """Return |c g_world| / (|c g_world| + |g_policy|) for a coefficient c; NaN where both are 0."""
        world = coeff * self.world_norm
        return world / (world + self.policy_norm) if world + self.policy_norm else math.nan


def term_gradients(
    policy: Iterable[Tensor | None],
    world: Iterable[Tensor | None],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> TermGradients:
    """Compare the gradients of policy_coeff * policy term and of the world-model term, one tensor a weight, or None.

    They are those of the whole optimizer step: summed over micro-batches and over data-parallel ranks. Where each rank
    holds the gradients of its own weights alone, ``reduce`` sums a tensor over the ranks.
    """
    products = [0.0, 0.0, 0.0]  # |policy|^2, |world|^2 and policy . world
    for p, w in zip(policy, world, strict=True):
        for k, (a, b) in enumerate(((p, p), (w, w), (p, w))):
            products[k] += 0.0 if a is None or b is None else float((a * b).sum())
    if reduce is not None:
        products = reduce(torch.tensor(products, dtype=torch.float64)).tolist()
    policy_norm, world_norm = math.sqrt(products[0]), math.sqrt(products[1])
    both = policy_norm * world_norm
    return TermGradients(
        policy_norm=policy_norm, world_norm=world_norm, cosine=products[2] / both if both else math.nan
    )
