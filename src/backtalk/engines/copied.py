"""Observation tokens that repeat the action before them, so that metrics can report their cross-entropy apart.

`cat notes.txt: No such file` repeats the command, and a model predicts the repeated part without knowing anything about
the environment.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenRole

COPIED_RUN = 3  # tokens; shorter matches are mostly coincidence


def copied_mask(sample: Sample) -> Tensor:
    """Return the observation tokens in a run of at least 3 that is also in the same turn's action; bool [T].

    Longer runs consist of runs of 3, so only those are looked up, in time linear in the number of tokens.
    """
    ids = sample.token_ids.tolist()
    actions: dict[int | None, set[tuple[int, ...]]] = defaultdict(set)
    copied = [False] * len(ids)
    for span in sample.spans:
        starts = range(span.start, span.end - COPIED_RUN + 1)
        if span.role is TokenRole.ACTION:
            actions[span.turn].update(tuple(ids[i : i + COPIED_RUN]) for i in starts)
        elif span.role in (TokenRole.ENV_OUTPUT, TokenRole.WARNING) and actions[span.turn]:
            for i in starts:
                if tuple(ids[i : i + COPIED_RUN]) in actions[span.turn]:
                    copied[i : i + COPIED_RUN] = [True] * COPIED_RUN
    return torch.tensor(copied, dtype=torch.bool)
