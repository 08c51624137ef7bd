"""Weights of each token in the loss of one optimizer step, to be written beside the step's trajectories.

``objective`` computes its loss with the same ``policy_weights`` and ``world_weights`` from the same samples, so the
viewer need not compute them again from rewards and settings. *_T is [T], the tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.loss import policy_weights, world_weights
from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenWeights


def step_weights(samples: Sequence[Sample], config: ObjectiveConfig) -> list[TokenWeights]:
    """Return the weights of each row of a step, in the order of its samples.

    ``samples`` is the whole step, the branches of a row one after the other, as ``build_samples`` makes them.
    ``config`` is that of the step, its coefficient a number. Observations of a control are learned in copies of the
    rows, so their weights have no place in a row and are left out: the world weights of the rows are then 0.
    """
    counts = TokenCounts.of(samples, config.world_loss_target)
    rows: list[TokenWeights] = []
    for sample in (sample for sample in samples if not sample.is_control):
        batch = collate([sample], 0)
        policy_T = policy_weights(batch, counts, config, torch.float64)[0] * (config.policy_coeff * sample.advantage)
        world_T = world_weights(batch, counts, config, torch.float64)[0] * config.world_coeff
        advantage = sample.advantage if sample.has_reward else None
        row = TokenWeights(advantage, tuple(policy_T.tolist()), tuple(world_T.tolist()))
        if sample.branch:
            before = rows.pop()
            row = replace(row, policy=before.policy + row.policy, world=before.world + row.world)
        rows.append(row)
    return rows
