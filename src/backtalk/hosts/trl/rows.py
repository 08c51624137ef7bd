"""Rows of a batch as the tensors that travel through TRL: weights of the world-model term, and whole rollouts.

TRL shuffles and splits every tensor of a batch alike, so what is keyed here comes to the loss with its row.

B rows, P tokens of the longest prompt, C of the longest completion. *_BC is [B, C], *_B is [B].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.loss import world_weights
from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenRole

WEIGHTS = "backtalk_world_weights"  # [B, C], before division by the count of the step
ROLLOUTS = "backtalk_rollouts"  # [B], 1 for the row in which a rollout begins, 0 for its other branches and padding
SCALES = "backtalk_row_scales"  # [B], what a row's advantage was multiplied by
COUNTS = "backtalk_counts"  # [2], rollouts and target tokens of the optimizer step over all processes

# With these counts the weights are those of the objective before they are divided by a count of the step.
_UNIT = TokenCounts(
    sequences=1,
    rewarded_sequences=1,
    action_tokens=1,
    policy_tokens=1,
    env_output_tokens=1,
    warning_tokens=1,
    target_tokens=1,
)
SEQUENCE_MEANS = ("grpo", "sapo")  # loss types of TRL that divide a row by its own tokens, then by the rows
ROW_SUMS = ("dr_grpo", "luspo")  # that divide by the rows alone


def world_inputs(
    samples: Sequence[Sample], starts: Sequence[int], completion_mask_BC: Tensor, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """Return the weights of a batch's world-model term, for rows whose completions begin at ``starts``."""
    batch = collate(samples, 0)
    weights_BT = world_weights(batch, _UNIT, config, torch.float32)
    weights_BC = torch.zeros(completion_mask_BC.shape, dtype=torch.float32)
    for b, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        weights_BC[b, : len(sample) - start] = weights_BT[b, start : len(sample)]
    device = completion_mask_BC.device
    return {
        WEIGHTS: weights_BC.to(device) * completion_mask_BC,
        ROLLOUTS: torch.tensor([float(sample.branch == 0) for sample in samples], device=device),
        SCALES: torch.ones(len(samples), device=device),
    }


def completion_start(sample: Sample) -> int:
    """Return the number of tokens of a sample that TRL takes as its prompt, which it never scores; at least 1."""
    ours = (sample.roles == TokenRole.ACTION) | (sample.turns >= 0)
    found = ours.nonzero().flatten().tolist()
    return max(found[0] if found else len(sample), 1)


def rollout_inputs(
    samples: Sequence[Sample], config: ObjectiveConfig, *, count: int, pad_token_id: int, device: Any
) -> tuple[dict[str, Tensor], list[Sample | None]]:
    """Return whole rollouts as the tensors that TRL's ``_generate_and_score_completions`` returns, and their rows.

    Rows without a token are appended until there are ``count``. The old log-probabilities are the sampler's, and rows
    without a reward have no policy tokens.
    """
    rows: list[Sample | None] = [*samples, *[None] * (count - len(samples))]
    empty = torch.zeros(0, dtype=torch.long)
    ids = [empty if row is None else row.token_ids for row in rows]
    starts = [1 if row is None else completion_start(row) for row in rows]
    prompts = [
        tokens[:start] if len(tokens) else torch.tensor([pad_token_id])
        for tokens, start in zip(ids, starts, strict=True)
    ]
    width = max(1, *(len(tokens) - start for tokens, start in zip(ids, starts, strict=True)))

    def completions(values: Sequence[Tensor], fill: float) -> Tensor:
        parts = [value[start:] for value, start in zip(values, starts, strict=True)]
        padded = pad_sequence([*parts, torch.zeros(width, dtype=parts[0].dtype)], batch_first=True, padding_value=fill)
        return padded[:-1].to(device)

    def left(values: Sequence[Tensor], fill: int) -> Tensor:
        return pad_sequence(list(values), batch_first=True, padding_value=fill, padding_side="left").to(device)

    policy = [empty if row is None else (row.sampled & row.has_reward).long() for row in rows]
    old = [torch.zeros(0) if row is None else row.sampling_logprobs for row in rows]
    inputs = {
        "prompt_ids": left(prompts, pad_token_id),
        "prompt_mask": left([torch.ones_like(prompt) for prompt in prompts], 0),
        "completion_ids": completions(ids, pad_token_id),
        "completion_mask": completions([torch.ones_like(tokens) for tokens in ids], 0),
        "tool_mask": completions(policy, 0),
        "old_per_token_logps": completions(old, 0.0),
        "advantages": torch.tensor([0.0 if row is None else row.advantage for row in rows], device=device),
    }
    real = world_inputs(samples, starts[: len(samples)], inputs["completion_mask"][: len(samples)], config)
    padding = len(rows) - len(samples)
    return inputs | {name: _pad_rows(value, padding) for name, value in real.items()}, rows


def _pad_rows(values: Tensor, count: int) -> Tensor:
    return torch.cat([values, values.new_zeros((count, *values.shape[1:]))])


def row_scales(rows: Sequence[Sample | None], loss_type: str, *, per_rollout: float) -> Tensor:
    """Return the factor on each row's advantage, so that a rollout of several rows weighs as much as one row; [B].

    TRL's means are over rows. ``per_rollout`` is the number of rows for each rollout, branches and padding included.
    """
    scales = torch.ones(len(rows))
    if loss_type in (*SEQUENCE_MEANS, *ROW_SUMS):
        scales *= per_rollout
    if loss_type in SEQUENCE_MEANS:
        for b, row in enumerate(rows):
            if row is not None and row.other_branches.actions:
                own = int(row.sampled.sum())
                scales[b] *= own / (own + row.other_branches.actions)
    return scales


def policy_weight(
    inputs: Mapping[str, Tensor], loss_type: str, *, max_completion_length: int, microbatches: float, token_share: float
) -> Tensor:
    """Return the sum of the weights of a micro-batch's action tokens in TRL's policy term, before advantages; scalar.

    ``microbatches`` is their number in the step, over all processes; ``token_share`` the micro-batches of a generation
    over those of a step.
    """
    mask_BC = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    actions_B, scales_B = mask_BC.sum(-1).float(), inputs[SCALES]
    rows = len(actions_B) * microbatches
    if loss_type in SEQUENCE_MEANS:
        return (scales_B * (actions_B > 0)).sum() / rows
    if loss_type in ROW_SUMS:
        length = max_completion_length if loss_type == "dr_grpo" else 1
        return (scales_B * actions_B).sum() / (rows * length)
    if loss_type == "bnpo":
        return (actions_B.sum() > 0).float() / microbatches
    return actions_B.sum() / inputs["num_items_in_batch"].clamp(min=1) * token_share
