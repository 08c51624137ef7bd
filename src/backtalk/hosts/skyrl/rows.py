"""Rollouts as the rows of a SkyRL batch, with the weights of their tokens.

SkyRL takes a row for each rollout, or several ("step-wise") of which the last carries the reward. Each branch of a
rollout is a row. Tensors over the tokens of a response are right-aligned.

B rows, T tokens of the longest response. *_BT is [B, T], *_B is [B].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.loss import world_weights
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

SAMPLES = "backtalk_samples"  # of a generator's output: the sample of each row, None for one that only fills up
ROLES = "token_roles"  # of another generator's output: a TokenRole for each response token
WEIGHTS = "backtalk_world_weights"  # [B, T] of a batch: w_t
FACTORS = "backtalk_policy_factors"  # [B] of a batch: what a row's advantage is multiplied by

Boundaries = Sequence[tuple[int, int]]  # first row of each mini-batch, and the one past its last


def samples_of(output: Mapping[str, Any], config: ObjectiveConfig) -> list[Sample | None]:
    """Return the sample of each row of a generator's output, made of its ``token_roles`` where it has no samples.

    Raises:
        ConfigError: it has neither, or roles that do not fit its tokens.
    """
    if (samples := output.get(SAMPLES)) is not None:
        return samples
    if (roles := output.get(ROLES)) is None:
        raise ConfigError(
            f"the generator returned no {ROLES!r}, so nobody knows which tokens are observations; add a list for each "
            "response with one backtalk.trajectory.TokenRole a token, or use RolloutGenerator"
        )
    columns = (output["prompt_token_ids"], output["response_ids"], output["loss_masks"], roles)
    trajectories = [_trajectory(*values) for values in zip(*columns, strict=True)]
    return [build_samples(TrajectoryGroup("", (trajectory,)), config)[0] for trajectory in trajectories]


def _trajectory(
    prompt: Sequence[int], response: Sequence[int], mask: Sequence[int], roles: Sequence[int]
) -> Trajectory:
    """Return a row of another generator as a trajectory, its actions sampled where the loss mask is not 0."""
    if len(roles) != len(response):
        raise ConfigError(f"a response of {len(response)} tokens has {len(roles)} {ROLES}; give one a token")
    segments, turn = [Segment(TokenRole.CONTEXT, tuple(prompt))], -1
    runs = groupby(zip(response, roles, mask, strict=True), key=lambda token: (TokenRole(token[1]), token[2] > 0))
    for (role, sampled), run in runs:
        ids = tuple(token for token, *_ in run)
        if sampled and role is not TokenRole.ACTION:
            raise ConfigError(f"loss_masks is 1 at tokens of role {role.name}; what a policy sampled is ACTION")
        if role is TokenRole.ACTION and segments[-1].role is not TokenRole.ACTION:
            turn += 1
        own_turn = None if turn < 0 or role is TokenRole.CONTEXT else turn
        segments.append(Segment(role, ids, (0.0,) * len(ids) if sampled else None, own_turn))
    return Trajectory(task_id="", sample_index=0, segments=tuple(segments), reward=0.0)


def response_start(sample: Sample) -> int:
    """Return the number of tokens that SkyRL takes as the prompt, which it never scores; at least one is left over."""
    ours = (sample.roles == TokenRole.ACTION) | (sample.turns >= 0)
    found = ours.nonzero().flatten().tolist()
    return min(max(found[0] if found else len(sample), 1), len(sample) - 1)


def row(sample: Sample, pad_token_id: int) -> dict[str, list[Any]]:
    """Return the fields of one row in SkyRL's generator output."""
    if len(sample) < 2:  # SkyRL needs a prompt and a response; nothing of them is learned
        ids = [*sample.token_ids.tolist(), pad_token_id, pad_token_id]
        return _row(ids[:1], ids[1:2], [0], [0.0])
    start, ids = response_start(sample), sample.token_ids.tolist()
    return _row(
        ids[:start], ids[start:], sample.sampled[start:].int().tolist(), sample.sampling_logprobs[start:].tolist()
    )


def _row(prompt: list[int], response: list[int], mask: list[int], logprobs: list[float]) -> dict[str, list[Any]]:
    return {
        "prompt_token_ids": prompt,
        "response_ids": response,
        "loss_masks": mask,
        "rollout_logprobs": logprobs,
    }


def fill_mini_batches(
    output: Mapping[str, Any], uids: Sequence[str], *, prompts: int, multiple: int, pad_token_id: int
) -> tuple[dict[str, Any], list[str]]:
    """Add rows without a token to learn, so that each mini-batch has a multiple of ``multiple`` rows.

    SkyRL would fill it up with copies of its first row, whose loss mask it empties and whose observations would then
    count twice. ``output`` is a generator's output with token-level rewards, ``uids`` name the prompt of each row, and
    a mini-batch has ``prompts`` prompts.
    """
    sizes = [len(list(rows)) for _, rows in groupby(uids)]
    order: list[tuple[int, bool]] = []  # a row, and whether it is one that only fills up, beside that row
    for first in range(0, len(sizes), prompts):
        begin, end = sum(sizes[:first]), sum(sizes[: first + prompts])
        # A rollout's last row has its reward, so it stays the last one.
        order += [(i, False) for i in range(begin, end - 1)]
        order += [(end - 1, True)] * (-(end - begin) % multiple) + [(end - 1, False)]
    empty = {**_row([pad_token_id], [pad_token_id], [0], [0.0]), "rewards": [0.0], "is_last_step": False, SAMPLES: None}
    filled = {
        key: [empty[key] if fills and key in empty else values[i] for i, fills in order]
        if isinstance(values, list) and len(values) == len(uids)
        else values
        for key, values in output.items()
    }
    return filled, [uids[i] for i, _ in order]


def response_weights(
    rows: Sequence[Sample | None], boundaries: Boundaries, config: ObjectiveConfig, shape: Sequence[int]
) -> Tensor:
    """Return w_t of every response token, with the counts of each mini-batch, 0 at other tokens; [B, T]."""
    weights_BT = torch.zeros(tuple(shape), dtype=torch.float32)
    for begin, end in boundaries:
        counts = TokenCounts.of(_samples(rows[begin:end]), config.world_loss_target)
        for b in range(begin, end):
            sample = rows[b]
            if sample is not None and len(sample) > 1:
                weights_T = world_weights(collate([sample], 0), counts, config, torch.float32)[0]
                response = weights_T[response_start(sample) :]
                weights_BT[b, shape[1] - len(response) :] = response
    return weights_BT


def policy_factors(rows: Sequence[Sample | None], boundaries: Boundaries, reduction: str, count: int) -> Tensor:
    """Return the factor on each row's advantage; [B], B being ``count``.

    It is 0 for a row without a reward. SkyRL's means are over rows, and here a rollout weighs as one however many rows
    it takes.
    """
    factors_B = torch.zeros(count)
    for begin, end in boundaries:
        samples = _samples(rows[begin:end])
        per_rollout = (end - begin) / max(sum(sample.branch == 0 for sample in samples), 1)
        for b in range(begin, end):
            sample = rows[b]
            if sample is None or not sample.has_reward:
                continue
            factors_B[b] = 1.0
            if reduction in ("sequence_mean", "seq_mean_token_sum_norm"):
                factors_B[b] *= per_rollout
            others = sample.other_branches.actions
            if reduction == "sequence_mean" and others:
                own = int(sample.sampled.sum())
                factors_B[b] *= own / (own + others)
    return factors_B


def _samples(rows: Sequence[Sample | None]) -> list[Sample]:
    return [sample for sample in rows if sample is not None]
