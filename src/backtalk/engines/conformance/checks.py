"""The checks. Each public function is one, named by the function; its claim is its docstring without "Check that"."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch

from backtalk.engines.conformance.base import Failure
from backtalk.engines.conformance.oracle import Expected
from backtalk.engines.conformance.suite import COEFFICIENT, TOLERANCE, Check, Suite
from backtalk.objective.config import PolicyNormalizer, WorldNormalizer, WorldOptions
from backtalk.objective.roles import WorldLossTarget


def zero_coefficient_is_grpo(suite: Suite) -> str:
    """Check that with coefficient 0 the gradient is that of the trainer's own GRPO, to the bit."""
    config = suite.config(world_model_coeff=0.0)
    ours, own = suite.step(config), suite.own_grpo(config)
    raw = list(zip(ours.raw, own.raw, strict=True))
    if not raw or not all(torch.equal(a, b) for a, b in raw):
        gap = max((float((a - b).abs().max()) for a, b in raw), default=math.nan)
        raise Failure(f"the raw gradients differ by up to {gap:.3g}")
    return f"{sum(a.numel() for a, _ in raw)} numbers are equal"


def doubled_coefficient_doubles_the_world_part(suite: Suite) -> str:
    """Check that the world-model part of the gradient is proportional to its coefficient."""

    def gradients(coefficient: float) -> list[float]:
        rows = suite.step(suite.config(world_model_coeff=coefficient)).gradients
        return [x for row in rows for x in row]

    zero, one, two = (gradients(k * COEFFICIENT) for k in (0, 1, 2))
    parts = [(b - a, c - a) for a, b, c in zip(zero, one, two, strict=True) if b != a]
    if not parts:
        raise Failure("the coefficient changes no token's gradient")
    worst = max(abs(c / (2 * b) - 1) for b, c in parts)
    if not worst <= TOLERANCE:
        raise Failure(f"twice the coefficient is not twice the world-model part: off by {worst:.3g} of it")
    return f"{len(parts)} tokens, largest relative error {worst:.1e}"


def observations_of_a_failed_row_are_learned(suite: Suite) -> str:
    """Check that a rollout that broke has no policy gradient, and its observations are learned."""
    gradients = suite.step(suite.config()).gradients[2]
    learned = [x for x in gradients if x]
    if len(learned) != 4 or any(x > 0 for x in learned):
        raise Failure(f"the failed row has gradients {[f'{x:.3g}' for x in gradients]}; 4 observation tokens have one")
    return "4 tokens"


def equal_rewards_leave_the_world_part(suite: Suite) -> str:
    """Check that a group of equal rewards has no policy gradient, and its observations are learned."""
    learned = [x for row in suite.step(suite.config()).gradients[5:] for x in row if x]
    if len(learned) != 9 or any(x > 0 for x in learned):
        raise Failure(f"{len(learned)} tokens of the group have a gradient; 9 observation tokens do")
    return "9 tokens"


def microbatches_change_nothing(suite: Suite) -> str:
    """Check that the gradient is the same however the step is split into micro-batches."""
    config = suite.config()
    return "; ".join(f"{n}: {suite.expect(config, suite.step(config, microbatches=n))}" for n in (2, 3, 9))


def processes_change_nothing(suite: Suite) -> str:
    """Check that the gradient is the same on two processes, one of which has no observation, with the same metrics."""
    config = suite.config()
    result = suite.step(config, processes=2)
    found = suite.expect(config, result)
    keys = [set(metrics) for metrics in result.metrics]
    if len(keys) != 2 or keys[0] != keys[1]:
        odd = sorted(keys[0] ^ keys[1]) if len(keys) == 2 else f"{len(keys)} logs"
        raise Failure(f"the processes do not log the same metrics: {odd}")
    return found


def step_without_observations(suite: Suite) -> str:
    """Check that a step without any observation is GRPO alone, and logs the same metrics as others."""
    config = suite.config()
    with_them, without = suite.step(config), suite.without_observations(config)
    found = suite.expect(suite.config(world_model_coeff=0.0), without)
    if odd := {key for metrics in with_them.metrics for key in metrics} ^ {k for m in without.metrics for k in m}:
        raise Failure(f"metrics that are not in both steps: {sorted(odd)}")
    return found


def effective_weight_is_logged(suite: Suite) -> str:
    """Check that the weight of an observation token relative to an action token is logged as effective_obs_weight."""
    config = suite.config()
    wanted = Expected(suite.rows, config).effective_obs_weight()
    for metrics in suite.step(config).metrics:
        found = [value for key, value in metrics.items() if key.endswith("effective_obs_weight")]
        if len(found) != 1:
            raise Failure(f"{len(found)} metrics have this name, among {sorted(metrics)}")
        if not math.isclose(found[0], wanted, rel_tol=1e-5):
            raise Failure(f"logged {found[0]:.6g}, not {wanted:.6g}")
    return f"{wanted:.4g}"


def _gradient(suite: Suite, **changes: Any) -> str:
    """Compare the gradient of every token under other settings."""
    config = suite.config(**changes)
    return suite.expect(config, suite.step(config))


_PLAIN: tuple[Callable[[Suite], str], ...] = (
    zero_coefficient_is_grpo,
    doubled_coefficient_doubles_the_world_part,
    observations_of_a_failed_row_are_learned,
    equal_rewards_leave_the_world_part,
    microbatches_change_nothing,
    processes_change_nothing,
    step_without_observations,
    effective_weight_is_logged,
)


def _check(run: Callable[[Suite], str]) -> Check:
    claim = " ".join((run.__doc__ or "").split()).removeprefix("Check that ")
    return Check(run.__name__, claim[:1].upper() + claim[1:], run)


_CHOICES = (
    ("world", "world_normalizer", WorldNormalizer),
    ("policy", "policy_normalizer", PolicyNormalizer),
    ("target", "world_loss_target", WorldLossTarget),
)
_WEIGHTS = {"world_loss_target": "warning_plus_env", "world": WorldOptions(weights={"warning": 0.25})}
CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"{prefix}_{choice}",
            f"The gradient of every token is the formula's with {setting}={choice}.",
            partial(_gradient, **{setting: choice}),
        )
        for prefix, setting, choices in _CHOICES
        for choice in get_args(choices)
    ),
    Check(
        "weights_of_roles",
        "Weights of roles multiply the gradients of their tokens and change no denominator.",
        partial(_gradient, **_WEIGHTS),
    ),
    *map(_check, _PLAIN),
)
