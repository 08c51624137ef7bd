"""A trainer that measures gradients in its first step: do both terms do what the formula says on this machine?

The first batch is passed through the workers five times at a learning rate of 0, and SkyRL's norms of the whole
gradient are compared. The optimizer's running means take those gradients in, so begin a long run without this trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from backtalk.errors import ConfigError
from backtalk.hosts.skyrl.loss import PREFIX
from backtalk.hosts.skyrl.rows import FACTORS, WEIGHTS
from backtalk.hosts.skyrl.trainer import EchoTrainer
from backtalk.objective.config import ObjectiveConfig

TOLERANCE = 1e-2  # of a norm: a backward pass in bfloat16 is not repeated to the bit


@dataclass(frozen=True, slots=True)
class Claim:
    """A relation of two gradient norms, and how far the measured ones are from it, relative."""

    text: str
    got: float
    wanted: float

    @property
    def error(self) -> float:
        """Return the relative error; infinite where nothing has a gradient."""
        return abs(self.got / self.wanted - 1) if self.wanted else float("inf")

    @property
    def holds(self) -> bool:
        """Return whether the relation holds within the tolerance."""
        return self.error <= TOLERANCE


class SmokeTrainer(EchoTrainer):
    """An ``EchoTrainer`` that checks its first step's gradient, prints what it found, and then trains on.

    Raises:
        ConfigError: a claim does not hold, or the batch has nothing to measure.
    """

    claims: tuple[Claim, ...] = ()

    def train_critic_and_policy(self, data: Any) -> dict[str, float]:
        """Measure the gradients of the first batch, then train on it as SkyRL does."""
        if not self.claims:
            self.claims = self.measure(data)
            for claim in self.claims:
                print(f"{'holds' if claim.holds else 'FAILS':6} {claim.text}: {claim.got:.6g}, {claim.wanted:.6g}")
            if failed := [claim.text for claim in self.claims if not claim.holds]:
                raise ConfigError(f"the gradient on this machine is not the formula's: {'; '.join(failed)}")
        return super().train_critic_and_policy(data)

    def measure(self, data: Any) -> tuple[Claim, ...]:
        """Compare gradient norms of one batch under several coefficients; return each claim and whether it holds."""
        objective, rate = self.objective, self.cfg.trainer.policy.optimizer_config.lr
        coeff = objective.at(self.global_step - 1).world_coeff or 0.05
        alone = replace(objective, policy_coeff=0.0, world_model_coeff=coeff)
        try:
            both = self._norm(data, replace(objective, policy_coeff=1.0, world_model_coeff=coeff))
            zero = self._norm(data, replace(objective, policy_coeff=1.0, world_model_coeff=0.0))
            world = self._norm(data, alone)
            twice = self._norm(data, replace(alone, world_model_coeff=2 * coeff))
            own = self._own_norm(data)
        finally:
            self.objective = objective
            self.dispatch.set_lr("policy", rate)
        if not world:
            raise ConfigError(
                "the first batch has no observation to learn from, so its gradient cannot be checked; use tasks in "
                "which the policy acts, or a larger batch"
            )
        between = min(max(both, abs(zero - world)), zero + world)
        claims = (
            Claim("twice the coefficient is twice the world-model gradient", twice, 2 * world),
            Claim("both terms add up: their norm lies between difference and sum of theirs", both, between),
        )
        if not own:
            return claims  # equal rewards in every group
        return Claim("coefficient 0 has the gradient of SkyRL's own loss", zero, own), *claims

    def _norm(self, data: Any, objective: ObjectiveConfig) -> float:
        """Return the norm of a batch's gradient with an objective, the mean over its mini-batches."""
        self.objective = objective
        return self._step(copy.deepcopy(data), {})

    def _own_norm(self, data: Any) -> float:
        """Return the same by SkyRL's own loss, on advantages that hold no world-model term."""
        data = copy.deepcopy(data)
        own = self.cfg.trainer.algorithm.policy_loss_type[len(PREFIX) :]
        data["advantages"] = data["advantages"] * data.pop(FACTORS)[:, None]
        data.pop(WEIGHTS)
        boundaries = data.metadata["policy_mini_batch_boundaries"]
        data = super(EchoTrainer, self)._normalize_advantages(
            data, boundaries, data.metadata["policy_prompt_boundaries"]
        )
        return self._pass(data, {"loss_fn": own, "loss_fn_config": {"policy_loss_type": own}})

    def _step(self, data: Any, options: Mapping[str, Any]) -> float:
        boundaries = data.metadata["policy_mini_batch_boundaries"]
        return self._pass(
            self._normalize_advantages(data, boundaries, data.metadata["policy_prompt_boundaries"]), options
        )

    def _pass(self, data: Any, options: Mapping[str, Any]) -> float:
        """Pass a batch through the workers once, mini-batch by mini-batch."""
        norms = []
        for chunks in self.dispatch.stage_data("policy", data, data.metadata["policy_mini_batch_boundaries"]):
            self.dispatch.forward_backward_from_staged("policy", chunks, **options)
            self.dispatch.set_lr("policy", 0.0)  # the schedule sets it anew after each step
            norms.append(float(self.dispatch.optim_step("policy") or 0.0))
        return sum(norms) / len(norms)
