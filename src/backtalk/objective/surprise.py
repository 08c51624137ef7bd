"""Leave the target tokens that surprise the policy most out of the world-model term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from backtalk.objective.roles import WorldLossTarget
from backtalk.objective.samples import Sample, rows_of, with_other_branches


def drop_surprising(
    samples: Sequence[Sample], logprobs: Sequence[float], target: WorldLossTarget, share: float
) -> list[Sample]:
    """Return a step's samples with a ``share`` of their target tokens deselected, those of the lowest log-probability.

    ``samples`` is the whole step, the branches of a row one after the other; ``logprobs`` are those of all its tokens
    under the policy that is about to learn, in nats at temperature 1. Of n targets the ceil((1 - share) n) likeliest
    stay, and others that are as likely as the last of these. So the choice depends on the step alone, and not on how it
    is split or ordered.
    """
    parts = torch.tensor(list(logprobs), dtype=torch.float64).split([len(sample) for sample in samples])
    masks = [sample.target_mask(target) for sample in samples]
    likeliest = torch.cat([torch.zeros(0), *(p[mask] for p, mask in zip(parts, masks, strict=True))]).sort().values
    kept = math.ceil((1 - share) * len(likeliest) - 1e-9)
    if kept == len(likeliest):
        return list(samples)
    least = likeliest[-kept]
    chosen = [
        replace(sample, world_scale=_scale(sample) * (part >= least))
        for sample, part in zip(samples, parts, strict=True)
    ]
    return [branch for row in rows_of(chosen) for branch in with_other_branches(row, target)]


def _scale(sample: Sample) -> torch.Tensor:
    """Return the ``world_scale`` of each token, 1 where a sample has none."""
    return torch.ones(len(sample)) if sample.world_scale is None else sample.world_scale
