"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2), in plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float | None], *, normalize_std: bool = True, eps: float = 1e-6) -> list[float]:
    """How much better each attempt was than its siblings; the numbers of a group sum to 0.

    A reward of None is outside the baseline (the world broke, or nobody scored the attempt): it moves
    neither the mean nor the spread, and its own advantage is 0. Equal rewards give exact zeros, and so
    does a single reward. ``normalize_std`` divides by the sample standard deviation (n - 1) + ``eps``.
    """
    known = [reward for reward in rewards if reward is not None]
    if not known or min(known) == max(known):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if normalize_std:
        scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) + eps
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
