"""Find what a checkpoint predicted worst in a rollout's observations, and what it expected there."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backtalk.trajectory import TokenRole, TokenScores, Trajectory

MOST = 12  # of one rollout and checkpoint
SURPRISING = -math.log(2)  # a token that was given less than one half
TOKENS_BEFORE = 8  # shown before a token
OBSERVED = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)


def find_surprises(
    trajectory: Trajectory, scores: Mapping[str, TokenScores], text_of: Callable[[Sequence[int]], str]
) -> dict[str, list[dict[str, Any]]]:
    """Return for each checkpoint the observation tokens of the highest cross-entropy, given less than one half."""
    ids = trajectory.token_ids
    spans = [(start, end) for start, end, segment in trajectory.spans() if segment.role in OBSERVED]
    positions = [i for start, end in spans for i in range(start, end)]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in scores.items():
        worst = heapq.nsmallest(MOST, positions, key=row.logprobs.__getitem__)
        found[name] = [
            {
                "at": i,
                "before": text_of(ids[max(0, i - TOKENS_BEFORE) : i]),
                "text": text_of(ids[i : i + 1]),
                "nats": -row.logprobs[i],
                "expected": [[text_of([token]), logprob] for token, logprob in row.expected.get(i, ())],
                "elsewhere": {other: -scores[other].logprobs[i] for other in scores if other != name},
            }
            for i in worst
            if row.logprobs[i] < SURPRISING
        ]
    return found
