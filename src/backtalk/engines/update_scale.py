"""The factor on the learning rate of steps in which the world-model term is alone."""

from __future__ import annotations

import math


class UpdateScale:
    """Running means of |g|^2 as Adam saw it, and as it would have been at coefficient 1 in world-only steps.

    Adam divides by the gradient's own running size, so it turns any coefficient of a term that is alone into a full
    step. The square root of the ratio of both means is the coefficient itself in a run of such steps, and tends to 1
    where other steps have set Adam's scale. ``decay`` is Adam's beta_2; only the ratio counts, so there is no bias
    correction.
    """

    def __init__(self, decay: float, seen_square: float = 0.0, unit_square: float = 0.0) -> None:
        self._decay, self._seen_square, self._unit_square = decay, seen_square, unit_square

    def update(self, seen: float, unit: float) -> float:
        """Add a step's norm, as it is and at coefficient 1, and return the factor."""
        self._seen_square = self._decay * self._seen_square + (1 - self._decay) * seen**2
        self._unit_square = self._decay * self._unit_square + (1 - self._decay) * max(unit, seen) ** 2
        return math.sqrt(self._seen_square / self._unit_square) if self._unit_square else 1.0

    def state(self) -> tuple[float, float]:
        """Return both means, which a new one begins with."""
        return self._seen_square, self._unit_square
