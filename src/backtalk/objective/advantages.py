"""Group-relative advantages: how the rewards of one task's rollouts compare, in plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from backtalk.errors import ConfigError

AdvantageEstimator = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(
    rewards: Sequence[float | None], *, estimator: AdvantageEstimator = "grpo", eps: float = 1e-6
) -> list[float]:
    """Compute group-relative advantages, one for each reward; they sum to 0.

    grpo     (r - mean) / (std + eps), std with n - 1    GRPO, arXiv 2402.03300, section 4.1.2
    dr_grpo  r - mean                                    Dr. GRPO, arXiv 2503.20783, section 3.2
    rloo     r - mean of the others                      RLOO, arXiv 2402.14740, eq. 8

    A reward of None (a broken sandbox, a deadline, or no verifier) is outside the baseline: it moves neither mean nor
    std, its advantage is 0, and n does not count it. Equal rewards give exact zeros, and so does a single reward.

    Raises:
        ValueError: a reward that is not finite.
        ConfigError: an unknown estimator.
    """
    known = [reward for reward in rewards if reward is not None]
    if any(not math.isfinite(reward) for reward in known):
        raise ValueError(f"rewards {known} are not all finite; a broken verifier's reward is None, which is left out")
    if not known or min(known) == max(known):
        return [0.0] * len(rewards)
    n, mean = len(known), math.fsum(known) / len(known)
    match estimator:
        case "grpo":
            scale = 1 / (math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (n - 1)) + eps)
        case "dr_grpo":
            scale = 1.0
        case "rloo":  # r - (n mean - r) / (n - 1)
            scale = n / (n - 1)
        case _:
            raise ConfigError(f"advantage={estimator!r} is unknown; use one of {list(get_args(AdvantageEstimator))}")
    return [0.0 if reward is None else (reward - mean) * scale for reward in rewards]
