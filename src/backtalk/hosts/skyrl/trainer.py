"""``EchoTrainer``: SkyRL's ``RayPPOTrainer`` with the world-model term in the advantages of its batches.

Two of SkyRL's methods do more here: ``convert_to_training_input`` also puts the weights of observations into the batch,
and ``_normalize_advantages`` moves them into the advantages, where ``loss`` reads them. A third leaves rollouts that
broke out of SkyRL's mean reward. Workers, dispatch, inference and checkpoints are SkyRL's.

B rows, T tokens of the longest response. *_BT is [B, T], *_B is [B].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch  # pyright: ignore[reportMissingImports]
from skyrl.backends.skyrl_train.utils.ppo_utils import (  # pyright: ignore[reportMissingImports]
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.train.trainer import RayPPOTrainer  # pyright: ignore[reportMissingImports]
from torch import Tensor

from backtalk.hosts.skyrl.loss import slopes_channel
from backtalk.hosts.skyrl.rows import (
    FACTORS,
    SAMPLES,
    WEIGHTS,
    Boundaries,
    fill_mini_batches,
    policy_factors,
    response_weights,
    samples_of,
)
from backtalk.hosts.skyrl.support import check_settings, check_token_roles, check_trainer
from backtalk.objective.coefficient import Schedule
from backtalk.objective.config import ObjectiveConfig, WorldNormalizer, WorldOptions
from backtalk.objective.roles import WorldLossTarget
from backtalk.objective.samples import Sample

_Trainer: Any = RayPPOTrainer


class EchoTrainer(_Trainer):
    """A ``RayPPOTrainer`` that also learns what its environment answers; it takes all of SkyRL's own arguments.

    Args:
        world_model_coeff: lambda, a number or a schedule over SkyRL's steps (a batch of rollouts each).
        world_normalizer, world_loss_target, max_seq_len, world: of the objective (docs/objective.md). The policy term,
            its clipping, its denominator and its KL are SkyRL's (``trainer.algorithm``).
        policy_coeff: factor of the policy term; 0 learns from observations alone.

    Raises:
        ConfigError: a setting that cannot be kept exactly, or a SkyRL that has moved on.
    """

    def __init__(
        self,
        *args: Any,
        world_model_coeff: float | Schedule = 0.05,
        world_normalizer: WorldNormalizer = "sequence_mean",
        world_loss_target: WorldLossTarget = "env_only",
        max_seq_len: int | None = None,
        world: WorldOptions | None = None,
        policy_coeff: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_trainer(RayPPOTrainer)
        self.objective = ObjectiveConfig(
            world_model_coeff=world_model_coeff,
            world_normalizer=world_normalizer,
            world_loss_target=world_loss_target,
            max_seq_len=max_seq_len,
            world=world or WorldOptions(),
            policy_coeff=policy_coeff,
        )
        super().__init__(*args, **kwargs)
        check_settings(self.cfg, self.objective)

    async def train(self) -> None:
        """Train, and close the worlds of the rollouts at the end."""
        try:
            await super().train()
        finally:
            if (close := getattr(self.generator, "close", None)) is not None:
                await close()

    # What SkyRL calls, in the order of a step.

    def postprocess_generator_output(
        self,
        generator_output: dict[str, Any],
        uids: list[str],
        metrics_generator_output: dict[str, Any] | None = None,
        metrics_uids: list[str] | None = None,
    ) -> tuple[dict[str, Any], list[str]]:
        """Leave rows without a reward out of SkyRL's metrics of rewards."""
        scored = [i for i, sample in enumerate(self._samples(generator_output)) if sample is None or sample.has_reward]
        if metrics_generator_output is None and 0 < len(scored) < len(uids):
            metrics_generator_output = {
                key: [values[i] for i in scored]
                for key, values in generator_output.items()
                if isinstance(values, list) and len(values) == len(uids)
            }
            metrics_uids = [uids[i] for i in scored]
        return super().postprocess_generator_output(generator_output, uids, metrics_generator_output, metrics_uids)

    def convert_to_training_input(self, generator_output: dict[str, Any], uids: list[str]) -> TrainingInputBatch:
        """Add the weights of observations, and what a row's advantage is multiplied by, to SkyRL's batch."""
        if self.cfg.generator.step_wise_trajectories:
            generator_output, uids = fill_mini_batches(
                generator_output,
                uids,
                prompts=self.cfg.trainer.policy_mini_batch_size,
                multiple=self.dispatch.get_lcm_dp_size(),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        rows = self._samples(generator_output)
        batch = super().convert_to_training_input(generator_output, uids)
        boundaries = batch.metadata["policy_mini_batch_boundaries"]
        batch[WEIGHTS] = response_weights(rows, boundaries, self.objective, batch["loss_mask"].shape)
        reduction = self.cfg.trainer.algorithm.loss_reduction
        batch[FACTORS] = policy_factors(rows, boundaries, reduction, count=len(batch["loss_mask"]))
        # A row without a reward is a group of its own, so it is in no other row's baseline.
        known = [sample is None or sample.has_reward for sample in rows]
        groups = [uid if scored else f"{uid}, row {b}" for b, (uid, scored) in enumerate(zip(uids, known, strict=True))]
        batch.metadata["uids"] = groups + batch.metadata["uids"][len(uids) :]  # SkyRL's padding last
        return batch

    def _samples(self, generator_output: dict[str, Any]) -> list[Sample | None]:
        """Return the sample of each row."""
        if SAMPLES not in generator_output:
            check_token_roles(self.cfg, self.objective)
        return samples_of(generator_output, self.objective)

    @torch.no_grad()
    def _normalize_advantages(
        self,
        data: TrainingInputBatch,
        mini_batch_boundaries: list[tuple[int, int]],
        prompt_boundaries: list[tuple[int, int]] | None = None,
    ) -> TrainingInputBatch:
        """Let SkyRL divide the advantages by its denominators, then write the world-model term beside them."""
        weights_BT, factors_B = data.pop(WEIGHTS), data.pop(FACTORS) * self.objective.policy_coeff
        policy_BT = self._policy_weights(data, factors_B, mini_batch_boundaries, prompt_boundaries)
        if bool((factors_B != 1).any()):
            data["advantages"] = data["advantages"] * factors_B[:, None]
        data = super()._normalize_advantages(data, mini_batch_boundaries, prompt_boundaries)
        coeff = self.objective.at(self.global_step - 1).world_coeff
        self._log_world(data, mini_batch_boundaries, weights_BT, policy_BT, coeff)
        data["advantages"] = slopes_channel(data["advantages"], data["loss_mask"], coeff * weights_BT)
        return data

    def _policy_weights(
        self, data: TrainingInputBatch, factors_B: Tensor, boundaries: Boundaries, prompt_boundaries: Boundaries | None
    ) -> Tensor:
        """Return the weight of each action token in the policy term, before advantages; [B, T]."""
        algorithm, weights_BT = self.cfg.trainer.algorithm, torch.zeros_like(data["loss_mask"])
        for begin, end in boundaries:
            mask_BT = data["loss_mask"][begin:end]
            weights_BT[begin:end] = mask_BT * apply_loss_reduction_to_advantages_minibatch(
                factors_B[begin:end, None] * (mask_BT > 0),
                mask_BT,
                algorithm.loss_reduction,
                self.cfg.trainer.micro_train_batch_size_per_gpu,
                algorithm.max_seq_len,
                [(a - begin, b - begin) for a, b in prompt_boundaries or () if begin <= a < end],
            )
        return weights_BT

    # Metrics, in SkyRL's own log.

    def _log_world(
        self, data: TrainingInputBatch, boundaries: Boundaries, weights_BT: Tensor, policy_BT: Tensor, coeff: float
    ) -> None:
        """Log the cross-entropy of target tokens before the update, and the weight of one beside an action's."""
        logprobs_BT, targets = data.get("action_log_probs"), int((weights_BT > 0).sum())
        loss = ce = math.nan  # SkyRL has no log-probabilities where it skips the forward pass
        if logprobs_BT is not None:
            costs_BT = -logprobs_BT.masked_fill(weights_BT == 0, 0.0)
            loss = float((costs_BT * weights_BT).sum()) / len(boundaries)
            ce = float(costs_BT.sum()) / targets if targets else math.nan
        actions = int((policy_BT > 0).sum())
        observation = float(weights_BT.sum()) / targets if targets else math.nan
        action = float(policy_BT.sum()) / actions if actions else math.nan
        self.all_metrics |= {
            "world/loss": loss,
            "world/target_ce": ce,
            "world/target_tokens": float(targets),
            "world/coeff": coeff,
            "world/effective_obs_weight": coeff * observation / action if action else math.nan,
        }
