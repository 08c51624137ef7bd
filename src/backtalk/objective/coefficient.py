"""The coefficient of the world-model term: a schedule, or a share of the gradient and the controller that keeps it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from backtalk.errors import ConfigError
from backtalk.settings import check_choices

# Weight of the past in the running means, for each measurement.
DECAY = 0.8


@dataclass(frozen=True, slots=True)
class Schedule:
    """A coefficient over the training steps: between its points linear, constant (``steps``) or half a ``cosine``.

    ``points`` maps steps to values, from step 0 on; after the last point the value stays. A cosine down to 0 is EnvRL's
    decay (arXiv 2606.17680).
    """

    points: Mapping[int, float]
    shape: Literal["linear", "steps", "cosine"] = "linear"

    def __post_init__(self) -> None:
        steps = list(self.points)
        if steps[:1] != [0] or any(a >= b for a, b in pairwise(steps)):
            raise ConfigError(f"schedule points are at steps {steps}; start at 0 and go up, as in {{0: 0.05, 100: 0}}")
        if not all(math.isfinite(value) and value >= 0 for value in self.points.values()):
            raise ConfigError(f"schedule values {list(self.points.values())} must be finite and >= 0")
        check_choices(self)

    @property
    def largest(self) -> float:
        """Return the largest value of any step."""
        return max(self.points.values())

    def at(self, step: int) -> float:
        """Return the value at a training step, counted from 0."""
        steps, values = list(self.points), list(self.points.values())
        k = bisect_right(steps, max(step, 0)) - 1
        if self.shape == "steps" or k + 1 == len(steps):
            return values[k]
        share = (step - steps[k]) / (steps[k + 1] - steps[k])
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return values[k] + share * (values[k + 1] - values[k])

    def times(self, factor: float) -> Schedule:
        """Return a schedule of ``factor`` times the values."""
        return replace(self, points={step: value * factor for step, value in self.points.items()})


@dataclass(frozen=True, slots=True)
class Share:
    """A coefficient c that makes the world-model term a share of the gradient over all trained weights.

    share = |c g_world| / (|c g_world| + |g_policy|), with g_policy the gradient of policy_coeff * policy term, and
    g_world that of the world-model term at coefficient 1. See ``CoefficientController``.
    """

    share: float | Schedule
    """Share of the world-model term, from 0 to below 1: a number, or a schedule of it."""
    min: float = 0.0
    """Smallest coefficient, where the share is above 0."""
    max: float = 1.0
    """Largest coefficient."""
    initial: float = 0.05
    """Coefficient until a step had a gradient of both terms, within min and max."""

    def __post_init__(self) -> None:
        if not 0 <= self.largest < 1:
            raise ConfigError(
                f"share={self.largest} of world_model_coeff leaves nothing to the policy term; use 0 <= share < 1, for "
                "example 0.2, or policy_coeff=0 to learn from observations alone"
            )
        if not 0 <= self.min <= self.max < math.inf or not 0 <= self.initial < math.inf:
            raise ConfigError(
                f"a share with min={self.min}, max={self.max}, initial={self.initial} has no coefficient to choose; "
                "use 0 <= min <= max and initial >= 0, all finite"
            )

    @property
    def largest(self) -> float:
        """Return the largest share of any step."""
        return self.share.largest if isinstance(self.share, Schedule) else self.share

    def at(self, step: int) -> float:
        """Return the share at a training step, counted from 0."""
        return self.share.at(step) if isinstance(self.share, Schedule) else self.share

    def times(self, factor: float) -> Share:
        """Return ``factor`` (0 to 1) times the share; the coefficients that do not follow from it fall with it."""
        share = self.share.times(factor) if isinstance(self.share, Schedule) else self.share * factor
        return replace(self, share=share, min=self.min * factor, initial=self.initial * factor)


class CoefficientController:
    """Running norms of both terms' gradients over the weights, and the coefficient that follows for a ``Share``.

        c = share / (1 - share) * |g_policy| / |g_world|

    Both norms are geometric means over the steps that were observed, the newest counting most: 1, DECAY, DECAY^2 and so
    on. So one step of unusual size does not set the coefficient, and the first one sets it at once. A step without a
    gradient of a term leaves that term's norm as it was. It is VQGAN's adaptive weight (arXiv 2012.09841, eq. 7) over
    all weights, and smoothed; GradNorm (arXiv 1711.02257) balances norms by learned weights. Plain arithmetic, the same
    for any engine.
    """

    def __init__(self) -> None:
        self._policy, self._world = _RunningLog(), _RunningLog()

    def observe(self, policy_norm: float, world_norm: float) -> None:
        """Take in the norms of a step: of policy_coeff * policy term, and of the world-model term at coefficient 1."""
        self._policy.add(policy_norm)
        self._world.add(world_norm)

    def coefficient(self, share: Share, step: int) -> float:
        """Return the coefficient of a training step, counted from 0; 0 where the share is 0."""
        wanted = share.at(step)
        if wanted == 0:
            return 0.0
        log_ratio = self._policy.mean - self._world.mean
        free = share.initial if math.isnan(log_ratio) else wanted / (1 - wanted) * math.exp(log_ratio)
        return min(max(free, share.min), share.max)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain data."""
        return {"policy": [self._policy.total, self._policy.weight], "world": [self._world.total, self._world.weight]}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore a ``state_dict``."""
        self._policy, self._world = _RunningLog(*state["policy"]), _RunningLog(*state["world"])


@dataclass(slots=True)
class _RunningLog:
    """The running mean of the logarithms of positive numbers."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        """Add a value, unless it is 0 or not finite and so has no logarithm."""
        if 0 < value < math.inf:
            self.total = DECAY * self.total + math.log(value)
            self.weight = DECAY * self.weight + 1

    @property
    def mean(self) -> float:
        """Return the mean; NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan
