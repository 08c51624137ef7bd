"""Signs that a run goes wrong in a way its reward does not show yet, read from the metrics of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from backtalk.objective.config import ObjectiveConfig

# Beyond it the policy's share of a step is below a tenth. A coefficient that is right for one model can be ten times
# too large for another: RFC 010 of OpenEnv found 0.05 stable for Qwen3-8B, a collapse with GLM-4.5-Air, and 0.005
# stable there.
MAX_GRAD_NORM_RATIO = 10.0
# Share of turns whose action holds the format of observations. A policy that begins to write the world's part
# answers itself; it starts with a few turns and grows.
MAX_ROLE_CONFUSION = 0.02
# A single observed token that counts for more than a sampled one.
MAX_EFFECTIVE_OBS_WEIGHT = 1.0


def step_warnings(metrics: Mapping[str, float], config: ObjectiveConfig) -> list[str]:
    """What a person should look at, as sentences that begin with ``metric=value``; empty where all is well.

    Metrics that are absent or NaN say nothing. ``config`` is the step's own, its coefficient a number.
    """
    lines: list[str] = []
    if config.world_coeff > 0 and metrics.get("target_tokens") == 0 and metrics.get("sequences", 0) > 0:
        lines.append(
            f"target_tokens=0: the step has no target token for world_loss_target={config.world_loss_target!r}, so "
            "the world-model term taught nothing; do observations reach the history as ENV_OUTPUT, and do the gates "
            "and weights of objective.world leave any?"
        )
    ratio = metrics.get("grad_norm_ratio", math.nan)
    if ratio > MAX_GRAD_NORM_RATIO:
        lines.append(
            f"grad_norm_ratio={ratio:.3g}: the world-model term pulls more than {MAX_GRAD_NORM_RATIO:g} times as hard "
            f"as the policy term; lower objective.world_model_coeff (now {config.world_coeff:g}) if this goes on"
        )
    weight = metrics.get("effective_obs_weight", math.nan)
    if weight > MAX_EFFECTIVE_OBS_WEIGHT:
        lines.append(
            f"effective_obs_weight={weight:.3g}: one observed token counts for more than one sampled token, as where "
            "actions are long and observations short; lower objective.world_model_coeff "
            f"(now {config.world_coeff:g}), or give both terms the normalizer token_mean or fixed_length"
        )
    confusion = metrics.get("role_confusion", math.nan)
    if confusion > MAX_ROLE_CONFUSION:
        lines.append(
            f"role_confusion={confusion:.3g}: that share of turns holds the format of observations, so the policy "
            "begins to write the world's part; lower objective.world_model_coeff, or learn from fewer observations"
        )
    return lines
