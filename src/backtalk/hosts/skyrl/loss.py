"""SkyRL's policy losses with the world-model term added, under names of their own.

A SkyRL loss is a sum over tokens of advantages that were divided by every denominator beforehand, times a mask of the
tokens that the policy sampled (``loss_mask``). What stands in the advantages where that mask is 0 is multiplied by 0,
so the world-model term travels there: the trainer writes the derivative of the term, -lambda w_t, and the loss reads

    loss = SkyRL's own loss + sum_t lambda w_t * -logp_t

Only negative numbers are read. SkyRL fills up a step with made-up rows, whose advantages outside the mask are positive
or 0 (``TokenBasedBatchIterator``), so they add nothing.

*_BT is [B, T]: B rows, T tokens of the longest response, right-aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import (  # pyright: ignore[reportMissingImports]
    PolicyLossRegistry,
    compute_policy_loss_cispo,
    compute_policy_loss_clip_cov,
    compute_policy_loss_kl_cov,
    dppo_policy_loss,
    gspo_policy_loss,
    ppo_policy_loss,
    register_policy_loss,
    rollout_is_policy_loss,
    sapo_policy_loss,
)
from torch import Tensor

from backtalk.errors import ConfigError

PREFIX = "backtalk_"  # of a loss with the world-model term; the rest is SkyRL's name
LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, float]]]] = {
    "regular": ppo_policy_loss,
    "dual_clip": ppo_policy_loss,
    "gspo": gspo_policy_loss,
    "cispo": compute_policy_loss_cispo,
    "sapo": sapo_policy_loss,
    "clip_cov": compute_policy_loss_clip_cov,
    "kl_cov": compute_policy_loss_kl_cov,
    "dppo": dppo_policy_loss,
    "rollout_is": rollout_is_policy_loss,
}


def register_losses() -> None:
    """Register every loss under its name with the prefix; those that are there already stay.

    Call it in the process that starts the training, before Ray: SkyRL sends its registry to the workers, which import
    this module, so Backtalk has to be installed on every node.
    """
    known = PolicyLossRegistry.list_available()
    for name in LOSSES:
        if PREFIX + name not in known:
            register_policy_loss(PREFIX + name)(_Loss(name))


class _Loss:
    """One of SkyRL's losses, by its name, with the world-model term."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a micro-batch and its metrics, as SkyRL's own losses do.

        Raises:
            ConfigError: no mask, so that nothing says which tokens the policy sampled.
        """
        if loss_mask is None:
            raise ConfigError(
                f"SkyRL called the loss {PREFIX + self.name} without a loss_mask, so observations cannot be told from "
                "actions; install a version that docs/skyrl.md names"
            )
        loss, metrics = LOSSES[self.name](
            log_probs,
            old_log_probs,
            advantages,
            config=replace(config, policy_loss_type=self.name),  # some look for their own name
            loss_mask=loss_mask,
            rollout_logprobs=rollout_logprobs,
        )
        world = world_loss(log_probs, advantages, loss_mask)
        # SkyRL sums metrics that end in _loss over micro-batches and processes, and takes the mean of others.
        return loss + world, {**metrics, "world_loss": world.item()}


def world_loss(logprobs_BT: Tensor, advantages_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Return the world-model term of a micro-batch, its coefficient included; scalar."""
    learned_BT = (loss_mask_BT == 0) & (advantages_BT < 0)
    slopes_BT = advantages_BT.masked_fill(~learned_BT, 0.0).detach()
    return (logprobs_BT.masked_fill(~learned_BT, 0.0) * slopes_BT).sum()


def slopes_channel(advantages_BT: Tensor, loss_mask_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Return advantages that carry the world-model term: -weights where the loss mask is 0; [B, T].

    ``weights_BT`` are lambda w_t, 0 at tokens that are not learned.

    Raises:
        ValueError: a token is sampled and learned as an observation.
    """
    if bool(((loss_mask_BT > 0) & (weights_BT > 0)).any()):
        raise ValueError(
            "a token is both in the loss mask and a target of the world-model term; a token is one of them"
        )
    return torch.where(loss_mask_BT > 0, advantages_BT, -weights_BT.to(advantages_BT))
