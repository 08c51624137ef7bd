"""Which words of the world are an echo: text of an observation that stands in the action it answers.

`cat notes.txt: No such file` repeats the command, and a model predicts the repeated part without knowing anything of
the world. So cross-entropies are told apart by it.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenRole

COPIED_RUN = 3  # tokens; shorter matches are mostly chance


def copied_mask(sample: Sample) -> Tensor:
    """Observation tokens in a run of at least 3 that also stands, in a row, in the same turn's action; bool [T].

    Every longer run is made of runs of 3, so it is enough to look those up: linear in the number of tokens.
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
