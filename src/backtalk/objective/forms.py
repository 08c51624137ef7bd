"""The published forms of both terms, token by token: pure functions that the objective weighs and adds up.

B samples, T tokens. *_BT is [B, T], *_B is [B], *_B1 is [B, 1]. Every function returns [B, T]; what it gives where a
token carries no weight is finite and means nothing.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.config import PolicyLoss, WorldLoss

MAE_MARGIN = 0.2  # rho of PaW; tokens predicted with more than 1 - rho do not teach any more


def policy_surrogate(
    logprobs_BT: Tensor,
    old_BT: Tensor,
    advantages_B: Tensor,
    trained_BT: Tensor,
    clip: tuple[float, float],
    loss: PolicyLoss,
) -> Tensor:
    """What the policy term takes the weighted mean of, by the name of the loss."""
    log_ratio_BT = (logprobs_BT - old_BT).masked_fill(~trained_BT, 0.0)
    adv_B1 = advantages_B[:, None].to(logprobs_BT.dtype)
    match loss:
        case "clip":
            return clipped(log_ratio_BT.exp(), adv_B1, clip)
        case "gspo":
            return clipped(sequence_ratio(log_ratio_BT, trained_BT), adv_B1, clip)
        case "cispo":
            return cispo(logprobs_BT, log_ratio_BT.exp(), adv_B1, clip)
    raise ConfigError(f"policy.loss={loss!r} is unknown; use one of {list(get_args(PolicyLoss))}")


def clipped(ratio_BT: Tensor, adv_B1: Tensor, clip: tuple[float, float]) -> Tensor:
    """-min(r adv, clip(r, 1 - eps_low, 1 + eps_high) adv) (GRPO, arXiv 2402.03300, eq. 3; DAPO, 2503.14476, eq. 8)."""
    return -torch.minimum(ratio_BT * adv_B1, ratio_BT.clamp(1 - clip[0], 1 + clip[1]) * adv_B1)


def sequence_ratio(log_ratio_BT: Tensor, trained_BT: Tensor) -> Tensor:
    """One ratio for all actions of a sample, the geometric mean of theirs (GSPO, arXiv 2507.18071, eq. 7)."""
    n_B1 = trained_BT.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio_BT.sum(-1, keepdim=True) / n_B1).exp().expand_as(log_ratio_BT)


def cispo(logprobs_BT: Tensor, ratio_BT: Tensor, adv_B1: Tensor, clip: tuple[float, float]) -> Tensor:
    """-stop_gradient(clip(r)) adv logp: a clipped token goes on teaching (CISPO, arXiv 2506.13585, eq. 4)."""
    return -ratio_BT.detach().clamp(1 - clip[0], 1 + clip[1]) * adv_B1 * logprobs_BT


def importance_weights(logprobs_BT: Tensor, sampling_BT: Tensor, trained_BT: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_sampler, cap), without a gradient: what a sampler of other numerics drew wrongly often.

    Truncated importance sampling (Ionides 2008; for rollouts of another engine, Yao et al. 2025).
    """
    gap_BT = (logprobs_BT.detach() - sampling_BT).masked_fill(~trained_BT, 0.0)
    return gap_BT.exp().clamp(max=cap)


def kl_to_reference(logprobs_BT: Tensor, reference_BT: Tensor, trained_BT: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) that is never negative, exp(d) - d - 1 with d = log q - log p, in nats.

    GRPO, arXiv 2402.03300, eq. 4 (Schulman's third estimator).
    """
    d_BT = (reference_BT - logprobs_BT).masked_fill(~trained_BT, 0.0)
    return d_BT.exp() - d_BT - 1


def world_surprise(logprobs_BT: Tensor, target_BT: Tensor, loss: WorldLoss) -> Tensor:
    """What the world-model term takes the weighted sum of, by the name of the loss."""
    logprobs_BT = logprobs_BT.masked_fill(~target_BT, 0.0)
    match loss:
        case "cross_entropy":
            return -logprobs_BT
        case "clipped_mae":
            return clipped_mae(logprobs_BT)
    raise ConfigError(f"world.loss={loss!r} is unknown; use one of {list(get_args(WorldLoss))}")


def clipped_mae(logprobs_BT: Tensor) -> Tensor:
    """max(1 - p - rho, 0): the error itself, so the slope at a token is p, and what cannot be predicted pulls little.

    PaW (arXiv 2606.02388) names the loss and rho = 0.2; that it is off above p = 1 - rho, rather than above rho, is
    our reading of "tokens already predicted well stop contributing".
    """
    return (1 - logprobs_BT.exp() - MAE_MARGIN).clamp(min=0)
