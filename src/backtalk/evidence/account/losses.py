"""Compute three objectives from one forward pass: ordinary RL, ECHO, and the world term alone.

They are the ``objective`` of a training step over the given episodes, with its default normalisers, so what is shown
is what a step would minimise. The value of GRPO's surrogate says little (at ratio 1 it is -advantage); what tells the
three apart is on how many tokens each has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from backtalk.objective.advantages import group_advantages
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.loss import objective
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup

Name = Literal["grpo", "echo", "verifier_free"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One objective on the episodes. ``policy`` and ``world`` are its terms before their coefficients.

    The counts are of tokens whose log-probability has a gradient that is not 0.
    """

    name: Name
    total: float
    policy: float
    world: float
    action_tokens: int
    observed_tokens: int


def as_if_sampled(trajectory: Trajectory, logprobs: Sequence[float]) -> Trajectory:
    """Return the trajectory with a model's own logprobs where an action has none: a ratio of 1."""
    segments = (
        replace(segment, logprobs=tuple(logprobs[start:end]))
        if segment.role is TokenRole.ACTION and not segment.is_sampled
        else segment
        for start, end, segment in trajectory.spans()
    )
    return replace(trajectory, segments=tuple(segments))


def advantages_of(trajectories: Sequence[Trajectory]) -> list[float | None]:
    """Return advantages relative to the task's other rollouts, or the reward itself without such; None without reward.

    A group of one has no advantage; RFC 010's demo puts the reward in its place, and so does this.
    """
    tasks: dict[str, list[int]] = {}
    for position, trajectory in enumerate(trajectories):
        tasks.setdefault(trajectory.task_id, []).append(position)
    found: list[float | None] = [trajectory.reward for trajectory in trajectories]
    for positions in tasks.values():
        if sum(trajectories[i].reward is not None for i in positions) > 1:
            relative = group_advantages([trajectories[i].reward for i in positions])
            for i, advantage in zip(positions, relative, strict=True):
                found[i] = None if trajectories[i].reward is None else advantage
    return found


def three_losses(
    trajectories: Sequence[Trajectory],
    logprobs: Sequence[Sequence[float]],
    advantages: Sequence[float | None],
    *,
    world_model_coeff: float = 0.05,
) -> list[Loss]:
    """Return the losses of one step over these rollouts. ``logprobs`` are a model's at temperature 1, in nats.

    An advantage of None keeps a rollout out of the policy term.
    """
    samples: list[Sample] = []
    columns: list[Tensor] = []
    for trajectory, scored, advantage in zip(trajectories, logprobs, advantages, strict=True):
        rows = build_samples(TrajectoryGroup(trajectory.task_id, (as_if_sampled(trajectory, scored),)))
        samples += (replace(row, advantage=advantage or 0.0, has_reward=advantage is not None) for row in rows)
        columns += torch.tensor(list(scored), dtype=torch.float32).split([len(row) for row in rows])
    configs: dict[Name, ObjectiveConfig] = {
        "grpo": ObjectiveConfig(world_model_coeff=0.0),
        "echo": ObjectiveConfig(world_model_coeff=world_model_coeff),
        "verifier_free": ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0),
    }
    return [_loss(name, config, samples, columns) for name, config in configs.items()]


def _loss(name: Name, config: ObjectiveConfig, samples: Sequence[Sample], columns: Sequence[Tensor]) -> Loss:
    batch = collate(samples, pad_token_id=0)
    logprobs_BT = torch.nn.utils.rnn.pad_sequence(list(columns), batch_first=True).requires_grad_()
    total, terms = objective(logprobs_BT, batch, TokenCounts.of(samples), config)
    if total.requires_grad:
        total.backward()
    pulled_BT = torch.zeros_like(logprobs_BT) if logprobs_BT.grad is None else logprobs_BT.grad
    pulled_BT = (pulled_BT != 0) & (torch.arange(logprobs_BT.shape[1]) > 0)  # a first token was never scored
    is_action_BT = batch.roles_BT == TokenRole.ACTION
    return Loss(
        name=name,
        total=float(total.detach()),
        policy=float(terms["policy_loss"]),
        world=float(terms["world_model_loss"]),
        action_tokens=int((pulled_BT & is_action_BT).sum()),
        observed_tokens=int((pulled_BT & ~is_action_BT).sum()),
    )
