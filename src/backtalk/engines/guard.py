"""Warnings from the metrics of a step: signs of a failing run that its reward does not show yet."""

from __future__ import annotations

import math
from collections.abc import Mapping

from backtalk.objective.config import ObjectiveConfig

# World-model term over policy term. A good coefficient for one model can be ten times too large for another: RFC 010 of
# OpenEnv found 0.05 stable for Qwen3-8B, but a collapse of GLM-4.5-Air, which was stable at 0.005.
MAX_GRAD_NORM_RATIO = 10.0
# Share of turns whose action contains the format of observations. A policy that writes observations answers itself; it
# begins with a few turns and grows.
MAX_ROLE_CONFUSION = 0.02
# Weight of one observation token over that of one action token.
MAX_EFFECTIVE_OBS_WEIGHT = 1.0


def step_warnings(metrics: Mapping[str, float], config: ObjectiveConfig) -> list[str]:
    """Return warnings about a step, sentences that begin with ``metric=value``; empty where all is well.

    Metrics that are absent or NaN give no warning. ``config`` is that of the step, its coefficient a number.
    """
    warnings: list[str] = []
    if config.world_coeff > 0 and metrics.get("target_tokens") == 0 and metrics.get("sequences", 0) > 0:
        warnings.append(
            f"target_tokens=0: the step has no target token for world_loss_target={config.world_loss_target!r}, so "
            "the world-model term learned nothing; do observations reach the history as ENV_OUTPUT, and do the gates "
            "and weights of objective.world leave any?"
        )
    ratio = metrics.get("grad_norm_ratio", math.nan)
    if ratio > MAX_GRAD_NORM_RATIO:
        warnings.append(
            f"grad_norm_ratio={ratio:.3g}: the world-model term pulls more than {MAX_GRAD_NORM_RATIO:g} times as hard "
            f"as the policy term; lower objective.world_model_coeff (now {config.world_coeff:g}) if this goes on"
        )
    weight = metrics.get("effective_obs_weight", math.nan)
    if weight > MAX_EFFECTIVE_OBS_WEIGHT:
        warnings.append(
            f"effective_obs_weight={weight:.3g}: one observation token weighs more than one action token, as where "
            "actions are long and observations short; lower objective.world_model_coeff "
            f"(now {config.world_coeff:g}), or give both terms the normalizer token_mean or fixed_length"
        )
    confusion = metrics.get("role_confusion", math.nan)
    if confusion > MAX_ROLE_CONFUSION:
        warnings.append(
            f"role_confusion={confusion:.3g}: that share of actions contains the format of observations, so the policy "
            "begins to write observations itself; lower objective.world_model_coeff, or learn from fewer observations"
        )
    return warnings
