"""Find signs in the metrics of a run that it fails, which its reward does not show yet, and lower the coefficient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from backtalk.objective.config import ObjectiveConfig

WINDOW_STEPS = 5  # the last steps are compared with the first; and no halving comes sooner after another
# From one half on the optimizer follows the world-model term more than the reward. Measured over 40 steps of triage: at
# 0.41 one seed in three lost 7 points of pass@1, at 0.77 all three lost some; from a model that knew both halves of the
# conversation no run lost any at 0.17 to 0.47.
MAX_WORLD_GRAD_SHARE = 0.5
MAX_EFFECTIVE_OBS_WEIGHT = 1.0  # weight of one observation token over that of one action token


@dataclass(frozen=True, slots=True)
class Change:
    """Bounds of a metric's mean over the last steps, from its mean over the first ones."""

    means: str
    most: float  # times the start
    margin: float = 0.0  # and this much more
    least: float = 0.0  # times the start


CHANGES = {
    "entropy": Change("the policy's actions become random, or one and the same", most=1.5, margin=0.1, least=0.2),
    "invalid_calls": Change("the policy forgets how to call its tools", most=2.0, margin=0.15),
    # A policy that writes observations answers itself; it begins with a few turns and grows.
    "role_confusion": Change("the policy begins to write observations itself", most=2.0, margin=0.02),
}
LOWERING = {"world_grad_share", *CHANGES}  # alarms that on_trouble answers


class Guard:
    """Reads the metrics of a run step by step, warns, and lowers the coefficient as ``world.on_trouble`` says.

    ``factor`` is what the coefficient (a number, a schedule or a share) is multiplied with from the next step on, and
    ``alarms`` are the metrics in trouble. All state follows from the metrics, so a resumed run reads those on record
    again and goes on as if it had not stopped.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.factor = 1.0
        self.alarms: set[str] = set()
        self._target, self._on_trouble = config.world_loss_target, config.world.on_trouble
        self._values: dict[str, list[float]] = {name: [] for name in CHANGES}
        self._lowered_at = -WINDOW_STEPS  # step

    def read(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """Take in the metrics of a step and return new warnings, lines that begin with ``metric=value``.

        An alarm is told when it begins. A metric that is absent, None or not finite (a mean over nothing) changes
        nothing.
        """
        known = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        coeff = known.get("world_model_coeff", 0.0)
        signs = self._now(known, coeff) | self._since_the_start(known, coeff)
        ringing = {name: line for name, (in_trouble, line) in signs.items() if in_trouble}
        new = [line for name, line in ringing.items() if name not in self.alarms]
        self.alarms = (self.alarms - signs.keys()) | ringing.keys()
        return new + self._lower(step, sorted(ringing.keys() & LOWERING), coeff)

    def _now(self, known: Mapping[str, float], coeff: float) -> dict[str, tuple[bool, str]]:
        """Compare metrics of a step with fixed bounds; return for each whether it is in trouble, and a line."""
        signs: dict[str, tuple[bool, str]] = {}
        if coeff > 0 and known.get("sequences", 0) > 0 and (targets := known.get("target_tokens")) is not None:
            signs["target_tokens"] = (
                targets == 0,
                f"target_tokens=0: the step has no target token for world_loss_target={self._target!r}, so the "
                "world-model term learned nothing; do observations reach the history as ENV_OUTPUT, and do the gates "
                "and weights of objective.world leave any?",
            )
        share, has_policy = known.get("world_grad_share"), known.get("policy_grad_norm_weights", math.nan) != 0
        if share is not None and has_policy:  # alone, the world-model term is always all of the gradient
            signs["world_grad_share"] = (
                share > MAX_WORLD_GRAD_SHARE,
                f"world_grad_share={share:.3g}: the world-model term is more than {MAX_WORLD_GRAD_SHARE:g} of the "
                "gradient over the weights, so the optimizer follows it rather than the reward; lower "
                f"objective.world_model_coeff (now {coeff:g})",
            )
        if (weight := known.get("effective_obs_weight")) is not None:
            signs["effective_obs_weight"] = (
                weight > MAX_EFFECTIVE_OBS_WEIGHT,
                f"effective_obs_weight={weight:.3g}: one observation token weighs more than one action token, as where "
                f"actions are long and observations short; lower objective.world_model_coeff (now {coeff:g}), or give "
                "both terms the normalizer token_mean or fixed_length",
            )
        return signs

    def _since_the_start(self, known: Mapping[str, float], coeff: float) -> dict[str, tuple[bool, str]]:
        """Compare metrics with their values at the start; return for each whether it is in trouble, and a line."""
        signs: dict[str, tuple[bool, str]] = {}
        cure = f"objective.world_model_coeff (now {coeff:g}) or the learning rate" if coeff > 0 else "the learning rate"
        for name, change in CHANGES.items():
            values = self._values[name]
            if name not in known:
                continue
            values.append(known[name])
            if len(values) <= WINDOW_STEPS:
                continue
            start, now = (sum(part) / WINDOW_STEPS for part in (values[:WINDOW_STEPS], values[-WINDOW_STEPS:]))
            signs[name] = (
                now > change.most * start + change.margin or now < change.least * start,
                f"{name}={now:.3g} over the last {WINDOW_STEPS} steps, {start:.3g} over the first {WINDOW_STEPS}: "
                f"{change.means}; if this goes on, lower {cure}",
            )
        return signs

    def _lower(self, step: int, alarms: list[str], coeff: float) -> list[str]:
        """Lower the factor if alarms rang in this step; return the line that says so."""
        if self._on_trouble == "warn" or not alarms or coeff == 0 or step < self._lowered_at + WINDOW_STEPS:
            return []
        halves = self._on_trouble == "halve"
        self.factor, self._lowered_at = (self.factor / 2 if halves else 0.0), step
        return [
            f"world_model_coeff={coeff:g}: {'halved' if halves else 'set to 0'} from step {step + 1} on, because of "
            f"{', '.join(alarms)} (objective.world.on_trouble={self._on_trouble})"
        ]
