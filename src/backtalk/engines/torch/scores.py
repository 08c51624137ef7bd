"""Score the tokens of batches and trajectories, and name the likeliest ones where another came.

B samples, T tokens, N tokens of all samples but the first of each, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from backtalk.engines.metrics import StepRecord
from backtalk.engines.torch.logprobs import Scores, TokenScorer
from backtalk.engines.torch.packing import MicroBatch
from backtalk.objective.batch import (
    Batch,
    TokenCounts,
    measured_mask,
    target_mask,
    token_temperatures,
    trained_mask,
)
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.loss import world_weights
from backtalk.objective.samples import Sample, to_samples
from backtalk.trajectory import TokenScores, Trajectory


def batch_scores(
    scorer: TokenScorer,
    batch: Batch,
    row_sizes: Sequence[int],
    config: ObjectiveConfig,
    counts: TokenCounts | None = None,
) -> Scores:
    """Score each token at its temperature, with a graph only where a term needs it, and none without ``counts``."""
    grad_hint_BT, trained_BT = None, torch.zeros_like(batch.roles_BT, dtype=torch.bool)
    if counts is not None:
        trained_BT = trained_mask(batch, config)
        if config.world_coeff > 0 and config.world.loss == "cross_entropy":  # its gradient is its weight
            dtype = torch.float64 if scorer.model.dtype == torch.float64 else torch.float32
            grad_hint_BT = -(config.world_coeff * world_weights(batch, counts, config, dtype))
    return scorer.scores(
        batch.token_ids_BT,
        batch.lengths_B,
        row_sizes,
        trained_BT=trained_BT,
        measured_BT=measured_mask(batch, config) if counts is not None else batch.sampled_BT,
        temperature_BT=token_temperatures(batch, config),
        grad_hint_BT=grad_hint_BT,
        head_kept_BT=target_mask(batch, config) if config.world.head == "keep" else None,
    )


def token_scores(
    scorer: TokenScorer,
    micro_batches: Callable[[Sequence[Sample]], list[MicroBatch]],
    collated: Callable[[MicroBatch], tuple[Batch, list[int]]],
    trajectories: Sequence[Trajectory],
    alternatives: int,
) -> list[TokenScores]:
    """Return the scores of each trajectory, over all its branches."""
    branches = [to_samples(trajectory) for trajectory in trajectories]
    found: dict[Sample, TokenScores] = {}
    for part in micro_batches([sample for row in branches for sample in row]):
        batch, row_sizes = collated(part)
        samples = [sample for row in part for sample in row]
        found |= zip(samples, _likely_tokens(scorer, batch, row_sizes, alternatives), strict=True)
    return [_joined([found[sample] for sample in row if len(sample)]) for row in branches]


@torch.no_grad()
def _likely_tokens(scorer: TokenScorer, batch: Batch, row_sizes: Sequence[int], alternatives: int) -> list[TokenScores]:
    """Return the scores of each sample of a batch, with at most ``alternatives`` tokens at a position."""
    positions_T = torch.arange(batch.token_ids_BT.shape[1], device=batch.token_ids_BT.device)
    mask_BT = (positions_T < batch.lengths_B[:, None]) & (positions_T > 0)
    k = min(alternatives, scorer.model.get_output_embeddings().weight.shape[0])
    logprobs_N, top_ids_NK, top_NK = scorer.likeliest(batch.token_ids_BT, batch.lengths_B, row_sizes, mask_BT, k)
    logprobs_BT = torch.zeros(mask_BT.shape, dtype=logprobs_N.dtype, device=mask_BT.device)
    logprobs_BT[mask_BT] = logprobs_N
    differs_N = top_ids_NK[:, 0] != batch.token_ids_BT[mask_BT]
    expected: list[dict[int, tuple[tuple[int, float], ...]]] = [{} for _ in range(len(mask_BT))]
    places = mask_BT.nonzero()[differs_N].tolist()
    for (row, position), ids, values in zip(
        places, top_ids_NK[differs_N].tolist(), top_NK[differs_N].tolist(), strict=True
    ):
        expected[row][position] = tuple(zip(ids, values, strict=True))
    lengths = batch.lengths_B.tolist()
    return [
        TokenScores(tuple(row[:length]), likelier)
        for row, length, likelier in zip(logprobs_BT.tolist(), lengths, expected, strict=True)
    ]


def _joined(branches: Sequence[TokenScores]) -> TokenScores:
    """Return the scores of a trajectory's branches as one, their positions counted on."""
    logprobs: list[float] = []
    expected: dict[int, tuple[tuple[int, float], ...]] = {}
    for branch in branches:
        expected |= {len(logprobs) + position: tokens for position, tokens in branch.expected.items()}
        logprobs += branch.logprobs
    return TokenScores(tuple(logprobs), expected)


def add_to_record(record: StepRecord, part: MicroBatch, batch: Batch, scores: Scores) -> None:
    """Add a micro-batch to the record of a step, after its backward pass."""
    record.add([sample for row in part for sample in row], batch, scores.logprobs_BT)
    if scores.states_ND is not None and scores.states_ND.grad is not None:
        record.add_states(scores.states_ND.grad, batch.sampled_BT[scores.trained_BT])
